"""Attention of segments in torch, for any device: those of about one length attend together, padded."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.base import PackedSegments, SegmentAttention
from skyrl_train.ops.causal import causal_attention


def bucketed_attention(segments: PackedSegments, device: torch.device) -> SegmentAttention:
    """Return the attention of `segments` whose tokens are on `device`."""
    return _Buckets(segments.bounds, segments.parents, device)


class _Buckets:
    """Implements `SegmentAttention`.

    Segments of the same parent whose lengths are close are padded on the right to one length and attend together. The
    padding is never seen: it comes after every real token.
    """

    def __init__(self, bounds: list[int], parents: list[int], device: torch.device) -> None:
        self._num_tokens = bounds[-1]
        together: dict[tuple[int, int], list[int]] = {}
        for segment, prefix in enumerate(parents):
            length = bounds[segment + 1] - bounds[segment]
            size = _padded_length(length) if prefix < 0 else _padded_rest(length)
            together.setdefault((prefix, size), []).append(segment)
        prefixes = sorted({prefix for prefix in parents if prefix >= 0})
        chains: dict[int, list[int]] = {-1: []}  # a prefix and its parents, as indices into `prefixes`
        for number, prefix in enumerate(prefixes):  # a prefix's parent comes before it
            chains[prefix] = [*chains[parents[prefix]], number]
        gather, place = [], torch.empty(self._num_tokens, dtype=torch.long)
        self._buckets: list[tuple[int, int, list[int]]] = []  # (segments, padded length, which prefixes)
        start = 0
        for (prefix, _), segments in together.items():
            size = max(bounds[s + 1] - bounds[s] for s in segments)
            for s in segments:
                length = bounds[s + 1] - bounds[s]
                gather.append(torch.arange(bounds[s], bounds[s] + size).clamp_(max=bounds[s + 1] - 1))
                place[bounds[s] : bounds[s + 1]] = torch.arange(start, start + length)
                start += size
            self._buckets.append((len(segments), size, chains[prefix]))
        self._sizes = [segments * size for segments, size, _ in self._buckets]
        edges = [0, *(edge for prefix in prefixes for edge in bounds[prefix : prefix + 2]), self._num_tokens]
        self._around_prefixes = [stop - start for start, stop in pairwise(edges)]  # every second piece is a prefix
        rows = torch.cat(gather)
        self._in_order = torch.equal(rows, torch.arange(self._num_tokens))
        self._rows, self._place = rows.to(device), place.to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        seen = [tensor.split(self._around_prefixes)[1::2] for tensor in (key, value)]
        if not self._in_order:
            query, key, value = (_Rearrange.apply(tensor, self._rows, self._place) for tensor in (query, key, value))
        parts = []
        split = (tensor.split(self._sizes) for tensor in (query, key, value))
        for (segments, size, chain), *bucket in zip(self._buckets, *split, strict=True):
            queries, keys, values = (tensor.unflatten(0, (segments, size)) for tensor in bucket)
            before = [parts_seen[i] for parts_seen in seen for i in chain]
            parts.append(causal_attention(queries, keys, values, before, scale=scale, window=window).flatten(0, 1))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out if self._in_order else out.index_select(0, self._place)


def _padded_length(length: int) -> int:
    """Round a sample's length up to a multiple of 16, coarser for long samples: at most an eighth is padding."""
    step = 1 << max(4, length.bit_length() - 4)
    return -(-length // step) * step


def _padded_rest(length: int) -> int:
    """Round the length of a segment with a parent up to a power of two, for few have the same parent."""
    return 1 << max(5, (length - 1).bit_length())


class _Rearrange(torch.autograd.Function):
    """Gathers rows in bucket order, with padding copies. Their gradient is zero, so backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None
