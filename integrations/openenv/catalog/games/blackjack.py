"""blackjack: come nearer to 21 than the dealer, and not above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation
from integrations.openenv.client.errors import OpenEnvError

MOVES = {"hit": 0, "stand": 1}
RANKS = ("ace", "2", "3", "4", "5", "6", "7", "8", "9", "10", "jack", "queen", "king")
MINE, DEALERS = slice(85, 137), slice(137, 189)  # of info_state: one number for each card, suit by suit


class Blackjack(Game):
    """Blackjack: pays +1, 0 or -1. Cards are dealt at random, so good play has no guaranteed reward.

    Good play is the basic strategy without doubling or splitting.
    """

    name: ClassVar[str] = "blackjack"

    def rules(self) -> str:
        return (
            "You play blackjack: get nearer to 21 than the dealer, but not above. An ace counts 1 or 11, a picture 10. "
            "Write hit for another card or stand to stop, between <action> and </action>."
        )

    def examples(self) -> Sequence[tuple[str, str]]:
        return [
            ("Your cards: 5, 4; total 9. The dealer shows: 10.", "hit"),
            ("Your cards: 10, queen; total 20. The dealer shows: 7.", "stand"),
        ]

    def view(self, seen: OpenSpielObservation) -> str:
        mine, dealers = self._cards(seen)
        return f"Your cards: {_words(mine)}; total {_total(mine)[0]}. The dealer shows: {_words(dealers)}."

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        return MOVES

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        mine, dealers = (_total(cards)[0] for cards in self._cards(seen))
        return f"You have {mine}, the dealer has {dealers}. {super().end(before, seen, total)}"

    def gold(self, seen: OpenSpielObservation) -> int | None:
        mine, dealers = self._cards(seen)
        (total, soft), shown = _total(mine), _value(dealers[0]) if dealers else 10
        weak_dealer = 2 <= shown <= 6  # an ace counts 1 here
        if soft:
            stand = total >= 19 or (total == 18 and 2 <= shown <= 8)
        else:
            stand = total >= 17 or (weak_dealer and (total >= 13 or (total == 12 and shown >= 4)))
        return MOVES["stand" if stand else "hit"]

    def unfinished(self, seen: OpenSpielObservation) -> float:
        return -1.0

    def metrics(self, seen: OpenSpielObservation) -> dict[str, float]:
        return {"total": float(_total(self._cards(seen)[0])[0])}

    def _cards(self, seen: OpenSpielObservation) -> tuple[list[int], list[int]]:
        """Return the ranks of my cards and of those that the dealer shows: 0 is an ace, 12 a king."""
        self.check_size(seen, 189)
        mine, dealers = (
            [card % 13 for card, has in enumerate(seen.info_state[part]) if has] for part in (MINE, DEALERS)
        )
        if len(mine) < 2:
            raise OpenEnvError(f"openspiel_env: a hand of blackjack has two cards or more, not {len(mine)}")
        return mine, dealers


def _value(rank: int) -> int:
    return min(rank + 1, 10)


def _total(ranks: Sequence[int]) -> tuple[int, bool]:
    """Return the best total, and whether an ace counts 11 in it."""
    hard = sum(map(_value, ranks))
    return (hard + 10, True) if 0 in ranks and hard <= 11 else (hard, False)


def _words(ranks: Sequence[int]) -> str:
    return ", ".join(RANKS[rank] for rank in ranks) or "nothing"
