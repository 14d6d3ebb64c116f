"""The interface of a game of OpenSpiel in the catalog: its rules, its board as text, and good moves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from integrations.openenv.client.errors import OpenEnvError

MAX_TEXT_CHARS = 2000  # of the engine's own text, in what the model reads


@dataclass(frozen=True, slots=True)
class OpenSpielObservation:
    """A player's observation. Only our own server sends `text`, `legal_names` and `lowest_return`."""

    info_state: tuple[float, ...]
    legal_actions: tuple[int, ...]
    game_phase: str = "playing"
    current_player_id: int = 0
    opponent_last_action: int | None = None
    text: str = ""
    legal_names: tuple[str, ...] = ()
    lowest_return: float | None = None

    @classmethod
    def from_fields(cls, observation: Mapping[str, Any]) -> Self:
        """Check and read a server's observation; OpenEnvError names the field that is missing or of a wrong type."""
        numbers, legal = observation.get("info_state"), observation.get("legal_actions")
        names, lowest = observation.get("legal_names") or [], observation.get("lowest_return")
        phase, player = observation.get("game_phase", "playing"), observation.get("current_player_id", 0)
        last, text = observation.get("opponent_last_action"), observation.get("text") or ""
        for name, value, holds in (
            ("info_state", numbers, isinstance(numbers, list) and all(map(_is_number, numbers))),
            ("legal_actions", legal, isinstance(legal, list) and all(map(_is_action, legal))),
            ("game_phase", phase, isinstance(phase, str)),
            ("current_player_id", player, isinstance(player, int)),
            ("opponent_last_action", last, last is None or _is_action(last)),
            ("text", text, isinstance(text, str)),
            ("legal_names", names, isinstance(names, list) and all(isinstance(each, str) for each in names)),
            ("lowest_return", lowest, lowest is None or _is_number(lowest)),
        ):
            if not holds:
                raise OpenEnvError(f"openspiel_env: the observation's {name} is {str(value)[:100]!r}")
        if names and len(names) != len(legal or []):
            raise OpenEnvError(f"openspiel_env: {len(legal or [])} legal_actions but {len(names)} legal_names")
        return cls(tuple(numbers), tuple(legal), phase, player, last, text[:MAX_TEXT_CHARS], tuple(names), lowest)  # ty: ignore[invalid-argument-type]


class Game(ABC):
    """One game with its parameters, for one of its players. All methods are pure functions of the observations."""

    name: ClassVar[str]  # in the engine
    default_params: ClassVar[Mapping[str, int]] = {}  # those that can be set
    smallest_params: ClassVar[Mapping[str, int]] = {}  # least values: below them the engine refuses or crashes
    num_players: ClassVar[int] = 1
    can_shape: ClassVar[bool] = False  # there is a shaped reward
    shapes: ClassVar[bool] = False  # and it is the default
    shaped_scale: ClassVar[float] = 1.0  # factor of the server's rewards in the shaped ones
    gold_reward: float | None = None  # the least that gold moves earn in the plain reward; None: unknown

    def __init__(self, params: Mapping[str, Any], agent_player: int) -> None:
        self.params = {**self.default_params, **params}
        self.agent_player = agent_player

    @abstractmethod
    def rules(self) -> str:
        """Return the system message that explains the game."""

    def examples(self) -> Sequence[tuple[str, str]]:
        """Return pairs of a view and a good move, used as example turns in the prompt."""
        return ()

    @abstractmethod
    def view(self, seen: OpenSpielObservation) -> str:
        """Return the text of an observation at the model's turn."""

    @abstractmethod
    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        """Return the actions by their words, in the legal actions' order; synonyms may follow."""

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        """Return the text at the end of the game. `total`: the sum of the server's rewards in this game."""
        return f"The game is over. You {'won' if total > 0 else 'lost' if total < 0 else 'drew'}."

    def won(self, seen: OpenSpielObservation, total: float) -> bool:
        """Return whether a game that is over was a success."""
        return total > 0

    def gold(self, seen: OpenSpielObservation) -> int | None:
        """Return a good player's move; None if unknown."""
        return None

    def shaped(self, before: OpenSpielObservation, seen: OpenSpielObservation, paid: float) -> float:
        """Return the shaped reward of the move from `before` to `seen`, for which the server paid `paid`."""
        return paid

    @property
    def shaped_gold_reward(self) -> float | None:
        return self.gold_reward

    @property
    def fewest_turns(self) -> int:
        """The number of moves in the shortest good game."""
        return 1

    def unfinished(self, seen: OpenSpielObservation) -> float:
        """Return the reward of a game whose turns ran out: that of the worst player, so that stalling never pays."""
        return -1.0 if seen.lowest_return is None else min(seen.lowest_return, 0.0)

    def shaped_unfinished(self, seen: OpenSpielObservation, plain: float) -> float:
        """Return the shaped reward of a game whose turns ran out. `plain`: the result of `unfinished`."""
        return self.shaped_scale * plain

    def metrics(self, seen: OpenSpielObservation) -> dict[str, float]:
        return {}

    def check_size(self, seen: OpenSpielObservation, size: int) -> None:
        """Raise OpenEnvError unless info_state has `size` numbers."""
        if len(seen.info_state) != size:
            raise OpenEnvError(
                f"openspiel_env: the server's observation has {len(seen.info_state)} numbers, {self.name} with "
                f"{dict(self.params)} has {size}; the official image takes no game_params, and its game is "
                "that of OPENSPIEL_GAME"
            )


def spoken(words: Sequence[str], most: int = 30) -> str:
    """Return "left, stay or right"; of more than `most` words the first, and the number of the rest."""
    if len(words) > most:
        return f"{', '.join(words[:most])} or one of {len(words) - most} more"
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "nothing"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_action(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
