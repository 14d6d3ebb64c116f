"""Samples of a group begin alike: find what they share, so that a forward pass computes it once.

samples    1 2 3 5 6 | 1 2 3 7 8 9 | 1 2 3 7 8 4      all begin with 1 2 3, the last two with 1 2 3 7 8
segments   1 2 3 | 5 6 | 7 8 | 9 | 4                  a tree: what is shared, and what follows it
before     -1      0     0     2   2                  the segment that each one continues
row        0 1 2 3 4 | 0 1 2 5 6 7 | 0 1 2 5 6 8      where each token of the batch stands in the segments

The samples of one prompt share the prompt. Where a turn's history was edited, each turn is a sample, and those of one
trajectory share the turns before the edit as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from skyrl_train.types import Batch

MIN_SHARED_TOKENS = 16  # below that, one more call of the attention costs more than the tokens saved


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """Tokens [begin, end) of each of the neighbouring samples [first, stop), which are equal up to `end`."""

    first: int
    stop: int
    begin: int
    end: int
    before: int  # the segment that ends where this one begins, -1 at the beginning


@dataclass(frozen=True)
class Segments:
    """A batch with everything shared stored once: U tokens in N segments, segment n is [offsets[n], offsets[n+1])."""

    input_ids: Tensor  # [U] int64
    position_ids: Tensor  # [U] int64: position in the sample
    offsets: Tensor  # [N+1] int64
    before: Tensor  # [N] int64: the segment that a segment continues, always an earlier one; -1: it begins samples
    row: Tensor  # [T] int64: where each token of the batch stands in `input_ids`


def shared_segments(batch: Batch) -> list[PrefixNode]:
    """Return segments that hold each shared prefix once; a segment stands after the one that it continues.

    Only neighbours share, and only where it spares a sample at least `MIN_SHARED_TOKENS`.
    """
    lengths, common = batch.lengths.tolist(), _common_with_previous(batch)
    found: list[PrefixNode] = []
    to_do = [(0, batch.num_samples, 0, -1)]  # samples that are equal up to a depth, where a segment ends
    while to_do:
        first, stop, depth, before = to_do.pop()
        end = min(common[first + 1 : stop], default=lengths[first])
        if stop - first == 1:
            if end > depth:
                found.append(PrefixNode(first, stop, depth, end, before))
            continue
        if end - depth >= MIN_SHARED_TOKENS:
            found.append(PrefixNode(first, stop, depth, end, before))
            depth, before = end, len(found) - 1
        parts = [i for i in range(first + 1, stop) if common[i] - depth < MIN_SHARED_TOKENS]
        to_do += [(start, end, depth, before) for start, end in pairwise([first, *parts, stop])][::-1]
    return found


def _common_with_previous(batch: Batch) -> list[int]:
    """Return [S] the number of leading tokens a sample shares with the one before it; 0 for the first of a group."""
    bounds, groups, ids = batch.offsets.tolist(), batch.group_index.tolist(), batch.input_ids.cpu()
    common = [0] * batch.num_samples
    for sample in range(1, batch.num_samples):
        if groups[sample - 1] == groups[sample]:
            start, middle, stop = bounds[sample - 1 : sample + 2]
            size = min(middle - start, stop - middle)
            differs = torch.nonzero(ids[start : start + size] != ids[middle : middle + size])
            common[sample] = int(differs[0]) if len(differs) else size
    return common


def share_prefixes(batch: Batch) -> Segments:
    """Return the tokens that a forward pass computes, and the row of each token of the batch among them."""
    bounds, device = batch.offsets.tolist(), batch.input_ids.device
    found = shared_segments(batch)
    edges = torch.tensor([0, *(segment.end - segment.begin for segment in found)]).cumsum(0)
    places = torch.cat([torch.arange(s.begin, s.end) + bounds[s.first] for s in found]).to(device)
    row = torch.empty(batch.num_tokens, dtype=torch.long)
    for segment, start, stop in zip(found, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        for sample in range(segment.first, segment.stop):
            row[bounds[sample] + segment.begin : bounds[sample] + segment.end] = torch.arange(start, stop)
    return Segments(
        input_ids=batch.input_ids[places],
        position_ids=batch.position_ids[places],
        offsets=edges.to(device),
        before=torch.tensor([segment.before for segment in found], device=device),
        row=row.to(device),
    )
