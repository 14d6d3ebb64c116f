"""Pages of the cache: the numbers alone, against plain lists of tokens, over random lives of slots and sessions."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from skyrl_train.engine.torch.pages import NOBODYS, Pages

SLOTS, SIZE, LONGEST = 5, 4, 30


def assert_sound(pages: Pages, kept: Iterable[list[int]] = ()) -> None:
    """Every page is free or held by slots and sessions, as often as was counted, and the table says so."""
    counted = [0] * (pages.num_pages + 1)
    for some in (*pages._of_slot, *kept):
        for page in some:
            counted[page] += 1
    assert counted == pages._num_holders
    assert counted[NOBODYS] == 0
    assert sorted(pages._free) == [page for page in range(1, pages.num_pages + 1) if not counted[page]]
    for slot, own in enumerate(pages._of_slot):
        assert pages.table[slot, : len(own)].tolist() == own


class Machine:
    """A cache of numbers in place of keys, beside what every slot and every session should read from it."""

    def __init__(self, num_pages: int) -> None:
        self.pages = Pages(num_pages, SIZE, num_slots=SLOTS, max_length=LONGEST, evict=self.evict)
        self.memory = [[-1] * SIZE for _ in range(num_pages + 1)]
        self.slots: list[list[int]] = [[] for _ in range(SLOTS)]
        self.kept: list[tuple[list[int], list[int]]] = []  # pages, what they hold
        self.num_copied = self.num_evicted = 0

    def evict(self) -> bool:
        if not self.kept:
            return False
        self.num_evicted += 1
        self.pages.drop(self.kept.pop(0)[0])
        return True

    def compute(self, slot: int, start: int, new: list[int]) -> None:
        stop = start + len(new)
        copies = self.pages.make_writable(slot, start, stop)
        before = [list(page) for page in self.memory]
        for copy in copies:
            self.memory[copy.target] = before[copy.source]
        self.num_copied += len(copies)
        for position, token in enumerate(new, start):
            page = int(self.pages.table[slot, position // SIZE])
            assert self.pages._num_holders[page] == 1, "somebody else reads what is written"
            self.memory[page][position % SIZE] = token
        self.slots[slot][start:] = new

    def share(self, source: int, target: int, length: int) -> None:
        self.pages.give(target, self.pages.held(source, length))
        self.slots[target] = self.slots[source][:length]

    def keep(self, slot: int) -> None:
        length = len(self.slots[slot])
        self.kept.append((self.pages.held(slot, length), list(self.slots[slot])))

    def load(self, number: int, slot: int, length: int) -> None:
        pages, tokens = self.kept[number]
        pages = pages[: self.pages.count(length)]
        self.pages.hold(pages)
        self.pages.give(slot, pages)
        self.slots[slot] = tokens[:length]

    def assert_right(self) -> None:
        assert_sound(self.pages, [pages for pages, _ in self.kept])
        held = [(self.pages.table[slot].tolist(), tokens) for slot, tokens in enumerate(self.slots)]
        for pages, tokens in [*held, *self.kept]:
            read = [number for page in pages[: self.pages.count(len(tokens))] for number in self.memory[page]]
            assert read[: len(tokens)] == tokens


def live(seed: int, num_pages: int, num_events: int = 150) -> Machine:
    dice, machine = random.Random(seed), Machine(num_pages)
    for _ in range(num_events):
        slot, other = dice.sample(range(SLOTS), 2)
        own, tokens = machine.slots[slot], [dice.randrange(1000) for _ in range(dice.choice([1, 1, 1, 3, 9]))]
        match dice.choice(["compute"] * 6 + ["keep"] * 4 + ["anew", "share", "load", "free", "move"]):
            case "compute":
                machine.compute(slot, len(own), tokens[: LONGEST - len(own)])
            case "anew":  # new weights: the same tokens, other numbers
                machine.slots[slot] = []
                machine.compute(slot, 0, [number + 1000 for number in own])
            case "share" if machine.slots[other]:
                machine.share(other, slot, dice.randint(1, len(machine.slots[other])))
            case "keep" if own:
                machine.keep(slot)
            case "load" if machine.kept:
                number = dice.randrange(len(machine.kept))
                machine.load(number, slot, dice.randint(1, len(machine.kept[number][1])))
            case "free":
                machine.pages.give(slot, [])
                machine.slots[slot] = []
            case "move":
                machine.pages.move(slot, other)
                machine.slots[other], machine.slots[slot] = own, []
        machine.assert_right()
    return machine


@pytest.mark.parametrize("seed", range(6))
def test_everyone_reads_what_it_wrote_however_pages_are_shared_and_kept(seed: int) -> None:
    roomy = live(seed, num_pages=500)
    assert roomy.num_copied > 10
    assert roomy.num_evicted == 0


@pytest.mark.parametrize("seed", range(6))
def test_slots_that_fit_by_themselves_never_lack_a_page(seed: int) -> None:
    tight = live(seed, num_pages=SLOTS * -(-LONGEST // SIZE), num_events=400)
    assert tight.num_evicted > 0


def test_only_the_last_page_of_what_is_shared_is_copied_and_only_where_it_is_not_full() -> None:
    machine = Machine(20)
    machine.compute(0, 0, list(range(8)))
    machine.share(0, 1, 8)
    machine.share(0, 2, 6)
    assert machine.pages.num_free == 18
    machine.compute(1, 8, [50])  # begins a page
    assert (machine.num_copied, machine.pages.num_free) == (0, 17)
    machine.compute(2, 6, [60])
    assert (machine.num_copied, machine.pages.num_free) == (1, 16)
    machine.compute(2, 7, [61])
    assert machine.num_copied == 1
    machine.assert_right()


def test_the_last_one_that_holds_a_page_writes_into_it_without_a_copy() -> None:
    machine = Machine(2)
    machine.compute(0, 0, [1, 2])
    machine.keep(0)
    machine.compute(0, 2, [3])  # there is a free page: the session keeps its own
    assert (machine.num_copied, machine.num_evicted) == (1, 0)
    machine.share(0, 1, 3)
    machine.compute(1, 3, [9])
    assert (machine.num_copied, machine.num_evicted) == (2, 1)
    machine.assert_right()
    full = Machine(1)
    full.compute(0, 0, [1, 2])
    full.keep(0)
    full.compute(0, 2, [3])  # there is none: the session goes, and nothing needs a copy
    assert (full.num_copied, full.num_evicted) == (0, 1)
    full.assert_right()


def test_a_cache_whose_pages_are_all_in_use_says_so() -> None:
    machine = Machine(2)
    machine.compute(0, 0, list(range(8)))
    with pytest.raises(RuntimeError, match="all 2 pages of the cache are in use"):
        machine.compute(1, 0, [1])
