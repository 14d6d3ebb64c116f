"""Which rank computes what: a table, and what holds for any batch."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.batch.packing import pack
from skyrl_train.learner.passes import KEYS_AS_A_TOKEN, Budget, passes, shares
from skyrl_train.learner.ranks import ONE_PROCESS, Ranks, rows_of
from skyrl_train.types import Batch
from tests.skyrl_train.batches import random_batch, sample, shared_batch


def batch_of(*groups: list[int]) -> Batch:
    """A group for each list, a sample for each length. All tokens of a sample are its own."""
    samples = []
    for group, lengths in enumerate(groups):
        for i, length in enumerate(lengths):
            row = sample("0" + "1" * (length - 1), group=str(group), trajectory=f"{group}_{i}")
            row.input_ids[:] = [len(samples) + 1] * length
            samples.append(row)
    return pack(samples)


def rank(number: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = number, size
    return ranks


@pytest.mark.parametrize(
    ("groups", "size", "expected"),
    [
        ([[3, 3], [3]], 1, [[0, 1, 2]]),
        ([[4], [4]], 2, [[0], [1]]),
        ([[2], [9], [3], [3]], 2, [[1], [0, 2, 3]]),  # 9 | 3 + 3 + 2
        ([[5, 5], [4, 4], [3, 3], [2, 2]], 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),  # 10 + 4 | 8 + 6
        ([[6], [6], [6]], 2, [[0, 2], [1]]),  # equal ones by their number
        ([[4, 4]], 3, [[0, 1], [], []]),  # a group is never split
        ([[1, 1], [2, 2], [3, 3]], 3, [[4, 5], [2, 3], [0, 1]]),
    ],
)
def test_the_dearest_group_goes_first_onto_the_rank_with_the_least_to_do(groups, size, expected):
    assert shares(batch_of(*groups), size) == expected


def test_a_long_sample_costs_more_than_its_tokens():
    long, half = KEYS_AS_A_TOKEN, KEYS_AS_A_TOKEN // 2  # one of 8192 costs 1.5 x 8192, one of 4096 1.25 x 4096
    assert shares(batch_of([long], [half], [half], [2100]), 2) == [[0], [1, 2, 3]]
    assert shares(batch_of([long], [half], [half], [4]), 2) == [[0], [1, 2, 3]]
    assert shares(batch_of([long], [half], [half], [2200], [4]), 2) == [[0, 4], [1, 2, 3]]


def test_tokens_behind_a_shared_prefix_cost_more_by_its_keys():
    """4000 shared tokens and two tails of 1000 behind them cost more than 5650; without the keys it would be less."""
    two = [sample("0" * 4000 + "1" * 1000, group="a", trajectory=f"a_{i}") for i in range(2)]
    for i, row in enumerate(two):
        row.input_ids[:] = [7] * 4000 + [8 + i] * 1000
    others = [sample("0" + "1" * (length - 1), group=f"{length}", trajectory=f"{length}") for length in (5650, 4)]
    for i, row in enumerate(others):
        row.input_ids[:] = [20 + i] * len(row.input_ids)
    assert shares(pack([*two, *others]), 2) == [[0, 1], [2, 3]]


def test_a_prefix_that_samples_share_counts_once():
    prefix = list(range(100, 130))
    shared = [sample("0" * 30 + "1" * 2, group="a", trajectory=f"a_{i}") for i in range(3)]
    for i, row in enumerate(shared):
        row.input_ids[:] = [*prefix, i, i]
    rows = [*shared, sample("0" + "1" * 39, group="b"), sample("011", group="c")]
    assert shares(pack(rows), 2) == [[3], [0, 1, 2, 4]]  # 40 | 30 + 3 x 2, + 3


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [Budget(30), Budget(100, 1), Budget(10_000)])
@pytest.mark.parametrize("make", [random_batch, shared_batch])
def test_every_rank_has_as_many_passes_and_every_token_is_computed_once(make, budget, size):
    for seed in range(3):
        batch = make(seed=seed)
        found = [passes(batch, budget, rank(number, size)) for number in range(size)]
        assert len({len(of_rank) for of_rank in found}) == 1
        places = torch.cat([each.places for of_rank in found for each in of_rank])
        assert sorted(places.tolist()) == list(range(batch.num_tokens))
        for of_rank in found:
            assert [each.num_tokens for each in of_rank] == [each.num_tokens for each in found[0]]
            for each in of_rank:
                assert torch.equal(each.batch.input_ids, batch.input_ids[each.places]) or each.is_padding
        assert sum(each.num_tokens for each in found[0]) == batch.num_tokens
        groups = [{int(group) for each in r if not each.is_padding for group in each.batch.group_index} for r in found]
        assert sum(map(len, groups)) == len(set.union(*groups))


def test_one_process_computes_the_batch_in_its_order_without_padding():
    batch = shared_batch()
    found = passes(batch, Budget(60), ONE_PROCESS)
    assert torch.equal(torch.cat([each.places for each in found]), torch.arange(batch.num_tokens))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 258])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_cut_as_torch_cuts_them(num_rows, size):
    chunks = list(torch.arange(num_rows).chunk(size)) + [torch.empty(0)] * size
    for number in range(size):
        first, stop = rows_of(num_rows, number, size)
        assert list(range(first, stop)) == chunks[number].tolist()
