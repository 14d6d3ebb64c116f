"""Attention of sequences of any length in one call: their shapes, and the plain computation that kernels must equal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyrl_train.ops.base import PackedSegments


@dataclass(frozen=True, slots=True)
class Ragged:
    """The places of the queries and keys of N sequences: int32 tensors on the device of the queries.

    Sequence n has the queries [query_offsets[n], query_offsets[n + 1]) and the keys that begin at key_offsets[n]: up to
    key_offsets[n + 1], or `num_keys[n]` of them where given. Its last query sees its last key, the query before one key
    less, and so on (causal, aligned at the end).
    """

    query_offsets: Tensor  # [N + 1]
    key_offsets: Tensor  # [N + 1]
    max_queries: int  # of one sequence
    max_keys: int
    num_keys: Tensor | None = None  # [N]; without gradient

    @staticmethod
    def of(query_lengths: list[int], key_lengths: list[int], device: torch.device) -> Ragged:
        """Sequences whose queries, and whose keys, lie end to end."""
        queries, keys = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (query_lengths, key_lengths))
        return Ragged(queries, keys, max(query_lengths), max(key_lengths))

    def to(self, device: torch.device) -> Ragged:
        return replace(
            self,
            query_offsets=self.query_offsets.to(device),
            key_offsets=self.key_offsets.to(device),
            num_keys=None if self.num_keys is None else self.num_keys.to(device),
        )


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, *, scale: float, window: int | None
) -> Tensor:
    """Attend one sequence after the other: query [T, heads, D], key and value [K, kv_heads, D] -> [T, heads, D].

    `window`: a query sees its own position and the `window - 1` before it; None: everything before it.
    """
    queries, starts = ragged.query_offsets.tolist(), ragged.key_offsets.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    if ragged.num_keys is not None:
        lengths = ragged.num_keys.tolist()
    parts = []
    for n, length in enumerate(lengths):
        own, seen = slice(queries[n], queries[n + 1]), slice(starts[n], starts[n] + length)
        distance = torch.arange(length - (own.stop - own.start), length)[:, None] - torch.arange(length)
        is_seen = (distance >= 0) & (distance < (window or length))
        repeats = query.shape[1] // key.shape[1]
        keys, values = (tensor[seen].repeat_interleave(repeats, 1) for tensor in (key, value))
        heads_first = (tensor.transpose(0, 1) for tensor in (query[own], keys, values))
        mask = is_seen.to(query.device)
        parts.append(F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale))
    return torch.cat([part.transpose(0, 1) for part in parts])


def gathered_keys(segments: PackedSegments, device: torch.device) -> tuple[Tensor | None, Ragged]:
    """Return the rows of the keys that each segment sees, one segment after the other, and where each one's lie.

    A segment's keys begin with those of its parents. Rows None: every segment sees its own keys only.
    """
    chains: list[Tensor] = []
    for (start, stop), parent in zip(pairwise(segments.bounds), segments.parents, strict=True):
        own = torch.arange(start, stop)
        chains.append(own if parent < 0 else torch.cat([chains[parent], own]))
    lengths = [stop - start for start, stop in pairwise(segments.bounds)]
    rows = None if all(parent < 0 for parent in segments.parents) else torch.cat(chains).to(device)
    return rows, Ragged.of(lengths, [len(chain) for chain in chains], device)


class RepeatedRows(torch.autograd.Function):
    """Rows of a tensor, some of them several times. Backward sums their gradients in float32."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(tensor)
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        total = torch.zeros((ctx.num_rows, *grad.shape[1:]), dtype=torch.float32, device=grad.device)
        return total.index_add_(0, rows, grad.float()).to(grad.dtype), None
