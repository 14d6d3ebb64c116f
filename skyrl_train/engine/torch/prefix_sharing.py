"""Finds what a new prompt shares with known token sequences, without comparing it with all of them.

Sequences are kept sorted. The one that shares most with a prompt stands right before or right behind the place where
the prompt would be, so one search and two comparisons are enough, however many sequences there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Generic, TypeVar

Owner = TypeVar("Owner")
Tokens = list[int]
MIN_SHARED = 16  # tokens; a shorter common prefix is cheaper to compute than to copy


class PrefixIndex(Generic[Owner]):
    """Token sequences and who owns them."""

    def __init__(self) -> None:
        self._sorted: list[Tokens] = []
        self._owners: list[Owner] = []  # of equal sequences, the first that was added comes first

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, tokens: Tokens, owner: Owner) -> None:
        """The list must not change as long as it is here."""
        place = bisect_right(self._sorted, tokens)
        self._sorted.insert(place, tokens)
        self._owners.insert(place, owner)

    def remove(self, tokens: Tokens, owner: Owner) -> None:
        place = bisect_left(self._sorted, tokens)
        while self._owners[place] is not owner:
            place += 1
        del self._sorted[place], self._owners[place]

    def longest(self, prompt: Tokens) -> tuple[int, Owner | None]:
        """Return how many tokens of the prompt some sequence begins with, and its owner; (0, None) below MIN_SHARED."""
        place = bisect_left(self._sorted, prompt)
        best: tuple[int, Owner | None] = (0, None)
        for neighbour in (place, place - 1):  # what is equal to the prompt or goes on stands behind the place
            if 0 <= neighbour < len(self._sorted):
                shared = common_prefix(self._sorted[neighbour], prompt)
                if shared > best[0]:
                    best = (shared, self._owners[neighbour])
        return best


def common_prefix(first: Tokens, second: Tokens) -> int:
    """Return how many leading tokens two lists share; 0 if fewer than `MIN_SHARED`. Compares slices, which is fast."""
    if first[:MIN_SHARED] != second[:MIN_SHARED]:
        return 0
    low, high = 0, min(len(first), len(second))
    if high < MIN_SHARED:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
