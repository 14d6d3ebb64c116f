"""Bookkeeping of a paged cache: which page belongs to whom. These are numbers on the host alone, no keys and values.

A page holds a fixed number of tokens. A sequence's tokens lie in the pages of its slot, one after the other. Several
slots, and sessions that wait for their next turn, may hold the same page: that is how tokens are shared without a copy.
Only a page with a single holder is ever written. Whoever wants to write into another gets one of its own first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

NOBODYS = 0  # the page that is never given out: rows without a sequence write there


@dataclass(frozen=True, slots=True)
class Copy:
    """The contents of page `source` are wanted in page `target` before the next pass."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class KeptPages:
    """The pages of a session's last turn. They are the cache's own memory, so they take none beside it."""

    pages: list[int]
    num_bytes: int = 0


class Pages:
    """The pages of all slots. `table` [slots, pages of the longest sequence] int32 on the host is what kernels read."""

    def __init__(
        self, num_pages: int, page_size: int, *, num_slots: int, max_length: int, evict: Callable[[], bool]
    ) -> None:
        """Take num_pages pages beside `NOBODYS`. `evict` lets go of what can be computed again; False: nothing left."""
        self.num_pages, self.page_size = num_pages, page_size
        self._evict = evict
        self._free = list(range(num_pages, NOBODYS, -1))
        self._num_holders = [0] * (num_pages + 1)
        self._of_slot: list[list[int]] = [[] for _ in range(num_slots)]
        self.table = torch.zeros((num_slots, self.count(max_length)), dtype=torch.int32)
        self._table = self.table.numpy()  # the same memory: writing one number is ten times as fast

    def count(self, length: int) -> int:
        """Return how many pages so many tokens fill."""
        return -(-length // self.page_size)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def held(self, slot: int, length: int) -> list[int]:
        """Hold the pages of the first `length` tokens of a slot once more, and return them."""
        pages = self._of_slot[slot][: self.count(length)]
        self.hold(pages)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._num_holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Hold them once less. What nobody holds is free."""
        for page in pages:
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                self._free.append(page)

    def give(self, slot: int, pages: list[int]) -> None:
        """Let a slot have these pages, which the caller holds for it, in place of its own."""
        self.drop(self._of_slot[slot])
        self._of_slot[slot] = list(pages)
        self._table[slot, : len(pages)] = pages

    def move(self, source: int, target: int) -> None:
        pages, self._of_slot[source] = self._of_slot[source], []
        self.give(target, pages)

    def make_writable(self, slot: int, start: int, stop: int) -> list[Copy]:
        """Let the slot alone hold the pages of its tokens [start, stop); return what must be copied for that.

        A page whose first token is written anew needs no copy.
        """
        pages, copies = self._of_slot[slot], []
        for number in range(start // self.page_size, self.count(stop)):
            if number == len(pages):
                pages.append(self._taken())
            elif self._is_shared(pages[number]):
                old, pages[number] = pages[number], self._taken()
                self.drop([old])
                if number * self.page_size < start:
                    copies.append(Copy(old, pages[number]))
            else:
                continue
            self._table[slot, number] = pages[number]
        return copies

    def _is_shared(self, page: int) -> bool:
        """Return whether somebody else holds the page. Sessions let go of it before the last free page is taken."""
        while self._num_holders[page] > 1 and not self._free:
            if not self._evict():
                break
        return self._num_holders[page] > 1

    def _taken(self) -> int:
        while not self._free:
            if not self._evict():
                raise RuntimeError(f"all {self.num_pages} pages of the cache are in use")
        page = self._free.pop()
        self._num_holders[page] = 1
        return page
