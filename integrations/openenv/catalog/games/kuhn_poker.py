"""kuhn_poker: one card each of jack, queen and king; pass or bet; the higher card wins what is in the middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation
from integrations.openenv.client.errors import OpenEnvError

PASS, BET = 0, 1
CARDS = ("jack", "queen", "king")
JACK, QUEEN, KING = range(3)


class KuhnPoker(Game):
    """Kuhn poker: each player pays 1, and 1 more for a bet, so a game pays +1, +2, -1 or -2.

    Cards are dealt at random, so good play has no guaranteed reward. Against the seeded opponents, which ignore their
    card, it is: bet or call with a king; pass with a queen, but call a bet; bluff with a jack, but fold after a bet.
    """

    name: ClassVar[str] = "kuhn_poker"
    num_players: ClassVar[int] = 2

    def rules(self) -> str:
        return (
            "You play poker with three cards: jack, queen, king; the king is highest. Each player has one card and has "
            "paid 1. A bet costs 1 more; passing after a bet loses. Write pass or bet between <action> and </action>."
        )

    def examples(self) -> Sequence[tuple[str, str]]:
        return [("You hold the king. The opponent bet.", "bet")]

    def view(self, seen: OpenSpielObservation) -> str:
        card, moves = self._hand(seen)
        said = [f"{'You' if mine else 'The opponent'} {('passed', 'bet')[move]}." for mine, move in moves]
        return " ".join([f"You hold the {CARDS[card]}.", *said])

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        bet_before = any(move == BET for _, move in self._hand(seen)[1])
        return {"pass": PASS, "bet": BET, **({"fold": PASS, "call": BET} if bet_before else {"check": PASS})}

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        return f"You {'won' if total > 0 else 'lost'} {abs(total):g}."

    def gold(self, seen: OpenSpielObservation) -> int | None:
        card, moves = self._hand(seen)
        facing_a_bet = any(move == BET for _, move in moves)
        if facing_a_bet:
            return PASS if card == JACK else BET
        return PASS if card == QUEEN else BET

    def unfinished(self, seen: OpenSpielObservation) -> float:
        return -2.0

    def _hand(self, seen: OpenSpielObservation) -> tuple[int, list[tuple[bool, int]]]:
        """Return my card and the moves so far, each with whether it was mine.

        info_state: the player, one-hot [2], my card, one-hot [3], then for each of three moves whether it was a pass or
        a bet [2].
        """
        self.check_size(seen, 11)
        card, pairs = seen.info_state[2:5], [seen.info_state[start : start + 2] for start in (5, 7, 9)]
        if sum(card) != 1 or any(sum(pair) > 1 for pair in pairs):
            raise OpenEnvError(f"openspiel_env: kuhn_poker's info_state is not one hand: {list(seen.info_state)}")
        moves = [pair.index(1.0) for pair in pairs if sum(pair) == 1]
        return card.index(1.0), [(turn % 2 == self.agent_player, move) for turn, move in enumerate(moves)]
