"""Attention of sequences of any length in one call: their shapes, and the plain computation that kernels must equal."""

from __future__ import annotations

from dataclasses import dataclass
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
    key_offsets[n + 1]. Its last query sees its last key, the query before one key less, and so on (causal, aligned at
    the end).

    With `pages` keys and values are [pages, page size, kv_heads, D] instead, and without gradient: those of sequence n
    fill the pages named in pages[n], one after the other, as far as its offsets say how many there are.
    """

    query_offsets: Tensor  # [N + 1]
    key_offsets: Tensor  # [N + 1]
    max_queries: int  # of one sequence
    max_keys: int
    pages: Tensor | None = None  # [N, P]
    num_keys: Tensor | None = None  # [N] of each sequence, for kernels that read pages

    @staticmethod
    def of(
        query_lengths: list[int], key_lengths: list[int], device: torch.device, pages: Tensor | None = None
    ) -> Ragged:
        """Return sequences whose queries, and whose keys, lie end to end."""
        queries, keys = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (query_lengths, key_lengths))
        in_pages = (None, None) if pages is None else (pages.to(device), torch.tensor(key_lengths).int().to(device))
        return Ragged(queries, keys, max(query_lengths), max(key_lengths), *in_pages)


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, *, scale: float, window: int | None
) -> Tensor:
    """Attend one sequence after the other: query [T, heads, D], key and value [K, kv_heads, D] -> [T, heads, D].

    With pages, key and value are [pages, page size, kv_heads, D].
    `window`: a query sees its own position and the `window - 1` before it; None: everything before it.
    """
    queries, starts = ragged.query_offsets.tolist(), ragged.key_offsets.tolist()
    parts = []
    for n, (start, stop) in enumerate(pairwise(starts)):
        own, length = slice(queries[n], queries[n + 1]), stop - start
        distance = torch.arange(length - (own.stop - own.start), length)[:, None] - torch.arange(length)
        is_seen = (distance >= 0) & (distance < (window or length))
        repeats = query.shape[1] // key.shape[-2]
        if ragged.pages is None:
            seen = (tensor[start:stop] for tensor in (key, value))
        else:
            pages = ragged.pages[n, : -(-length // key.shape[1])]
            seen = (tensor[pages].flatten(0, 1)[:length] for tensor in (key, value))
        keys, values = (tensor.repeat_interleave(repeats, 1) for tensor in seen)
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
