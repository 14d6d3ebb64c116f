"""Any other turn-based game of OpenSpiel, described by the engine's own text if our server sends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation, spoken

SHOWN_NUMBERS = 24  # of an info_state without text


class OtherGame(Game):
    """A game without rules in the prompt: the model must know it by its name. Moves may also be given by number."""

    def __init__(self, name: str, params: Mapping[str, object], agent_player: int) -> None:
        super().__init__(params, agent_player)
        self.game = name

    def rules(self) -> str:
        return (
            f"You play {self.game.replace('_', ' ')} as player {self.agent_player}. "
            "Write one of the legal moves between <action> and </action>."
        )

    def view(self, seen: OpenSpielObservation) -> str:
        return f"{self._position(seen)}\nLegal moves: {spoken(list(self.names(seen)))}."

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        words: Sequence[str] = seen.legal_names or [str(action) for action in seen.legal_actions]
        return dict(zip(words, seen.legal_actions, strict=True))

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        return f"{self._position(seen)}\n{super().end(before, seen, total)}".lstrip()

    def _position(self, seen: OpenSpielObservation) -> str:
        """Return the engine's text; without it, the numbers of the info_state that are not 0."""
        if seen.text.strip():
            return seen.text.strip("\n")
        there = [f"{index}={value:g}" for index, value in enumerate(seen.info_state) if value]
        more = f" and {len(there) - SHOWN_NUMBERS} more" if len(there) > SHOWN_NUMBERS else ""
        return f"Position: {', '.join(there[:SHOWN_NUMBERS])}{more}"
