"""The forward passes of a batch, spread over ranks. Every rank computes the same plan and needs nobody to tell it.

A pass over a sharded model is a collective: a rank with one pass less would leave the others waiting for ever. So all
have as many as the one with the most, and one that has no samples left computes a pass that counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from skyrl_train.batch.packing import micro_cuts
from skyrl_train.batch.prefix_tree import shared_segments
from skyrl_train.learner.ranks import Ranks
from skyrl_train.types import Batch

KEYS_AS_A_TOKEN = 8192  # attending to so many keys costs a token as much as its linear layers: about 6 x hidden size


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that one forward pass may hold: tokens, and samples if limited."""

    max_tokens: int
    max_samples: int | None = None

    def cut(self, batch: Batch) -> list[list[int]]:
        """Return the samples of each pass."""
        return micro_cuts(batch, self.max_tokens, self.max_samples)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of this rank. `places`: of its tokens in the whole batch, none in a pass of padding."""

    batch: Batch
    places: Tensor
    num_tokens: int  # of all ranks together

    @property
    def is_padding(self) -> bool:
        return not len(self.places)


def passes(batch: Batch, budget: Budget, ranks: Ranks) -> list[Pass]:
    """Return the passes of this rank, as many as every other rank has."""
    cuts_of_ranks = [_cuts(batch, samples, budget) for samples in shares(batch, ranks.size)]
    lengths = batch.lengths.tolist()
    found = []
    for cuts in zip_longest(*cuts_of_ranks, fillvalue=()):
        num_tokens = sum(lengths[sample] for cut in cuts for sample in cut)
        mine = list(cuts[ranks.rank])
        found.append(Pass(batch.select(mine) if mine else padding(batch), batch.places(mine), num_tokens))
    return found


def shares(batch: Batch, size: int) -> list[list[int]]:
    """Return the samples that each of `size` ranks computes, in the order of the batch.

    A group is never split, so what its samples share is computed once. The dearest group comes first, onto the rank
    that has the least to do; between equals the first one is taken.
    """
    if size == 1:
        return [list(range(batch.num_samples))]
    samples: dict[int, list[int]] = {}
    for sample, group in enumerate(batch.group_index.tolist()):
        samples.setdefault(group, []).append(sample)
    costs = _costs(batch)
    load, found = [0] * size, [[] for _ in range(size)]
    for group in sorted(samples, key=lambda group: (-costs[group], group)):
        rank = load.index(min(load))
        load[rank] += costs[group]
        found[rank] += samples[group]
    return [sorted(share) for share in found]


def padding(batch: Batch) -> Batch:
    """Return two tokens of which one is trained, on the device of the batch."""
    ids = batch.input_ids.new_zeros(2)
    zeros = torch.zeros(2, device=ids.device)
    return Batch(
        input_ids=ids,
        offsets=torch.tensor([0, 2], device=ids.device),
        loss_mask=torch.tensor([False, True], device=ids.device),
        rollout_logprobs=zeros,
        rewards=zeros,
        group_index=ids[:1],
        trajectory_index=ids[:1],
    )


def _cuts(batch: Batch, samples: list[int], budget: Budget) -> Iterator[list[int]]:
    """Yield the samples of each pass of a rank that computes `samples`."""
    if samples:
        for cut in budget.cut(batch.select(samples)):
            yield [samples[i] for i in cut]


def _costs(batch: Batch) -> dict[int, int]:
    """Return the cost of each group: tokens that a pass computes, each dearer by the keys that it attends to."""
    groups = batch.group_index.tolist()
    costs = dict.fromkeys(groups, 0)
    for segment in shared_segments(batch):
        num_tokens = segment.end - segment.begin
        costs[groups[segment.first]] += num_tokens * (2 * KEYS_AS_A_TOKEN + segment.begin + segment.end)
    return costs
