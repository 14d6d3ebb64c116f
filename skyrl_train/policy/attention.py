"""The attention hook of the policy: every layer hands its queries, keys and values to an object that the caller chose.

The learner passes `PackedAttention` (samples end to end, shared prefixes once, nothing cached), the engine its
`CachedAttention`. Both use the same weights and the same forward code of the model family; no mask tensor is ever built
by transformers.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skyrl_train.ops.cpu.causal import causal_attention
from skyrl_train.ops.cpu.tiled_attention import Segments, TiledAttention, can_attend
from skyrl_train.ops.cuda import flash_attention, has_flash
from skyrl_train.ops.ragged import Ragged, RepeatedRows
from skyrl_train.policy.refusal import ModelRefused

ATTENTION_NAME = "skyrl"  # as transformers knows it; it has no mask function there, so models build no mask


class Attention(Protocol):
    """What a forward pass of the policy needs: attend, layer by layer."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """query [T, heads, D], key and value [T, kv_heads, D] of the row's new tokens -> [T, heads, D].

        `window`: a token sees itself and the `window - 1` tokens before it; None: everything before it.
        """
        ...


def register_attention() -> None:
    """Make the hook known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention_forward)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention: Attention | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **family: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D]."""
    if attention is None:
        raise ModelRefused(f"{type(module).__name__} does not hand keywords to its attention")
    for name in ("softcap", "s_aux"):
        if family.get(name) is not None:
            raise ModelRefused(
                f"{type(module).__name__} wants `{name}` in its attention, which this project cannot compute"
            )
    if attention_mask is not None or dropout:
        raise ModelRefused(
            f"{type(module).__name__} wants a mask or dropout in its attention, which this project cannot compute"
        )
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: Any = module.layer_idx
    return attention.attend(layer, *rows, scale=scaling, window=sliding_window)[None], None


class PackedAttention:
    """Causal attention inside each sequence of a packed row. Exact, differentiable, without state: safe to recompute.

    `offsets` [N+1]: segment n is [offsets[n], offsets[n+1]). `before` [N]: the segment that it continues, -1 if it
    begins a sequence; it sees that one whole, and what that one continues, and so on. Without `before`, every segment
    is a sequence of its own.

    On a GPU all segments attend in one call, each to the keys of what it continues and its own, gathered. Elsewhere
    segments that continue the same one and whose lengths are close are padded on the right to one length and attend
    together (the padding is never seen: it comes after every real token).
    """

    def __init__(self, offsets: Tensor, before: Tensor | None = None, device: torch.device | None = None) -> None:
        """device: of the tokens; by default that of `offsets`."""
        self._device, self._bounds = device or offsets.device, offsets.tolist()
        self._continued = [-1] * (len(self._bounds) - 1) if before is None else before.tolist()
        self._num_tokens = self._bounds[-1]

    @cached_property
    def _buckets(self) -> _Buckets:
        return _Buckets(self._bounds, self._continued, self._device)

    @cached_property
    def _gathered(self) -> tuple[Tensor | None, Ragged]:
        return gathered_keys(self._bounds, self._continued, self._device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        if query.shape[0] != self._num_tokens:
            raise ValueError(f"{query.shape[0]} tokens, but the offsets of PackedAttention end at {self._num_tokens}")
        if has_flash(query.device, query.dtype, query.shape[-1]):
            rows, ragged = self._gathered
            if rows is not None:
                key, value = RepeatedRows.apply(key, rows), RepeatedRows.apply(value, rows)
            return flash_attention(query, key, value, ragged, scale=scale, window=window)
        return self._buckets.attend(query, key, value, scale, window)


def gathered_keys(bounds: list[int], continued: list[int], device: torch.device) -> tuple[Tensor | None, Ragged]:
    """(rows of the keys that the segments see, one segment after the other, and where each one's lie).

    Of a segment that continues another, those of the other come first. Rows None: every segment sees its own keys only.
    """
    chains: list[Tensor] = []
    for (start, stop), prefix in zip(pairwise(bounds), continued, strict=True):
        own = torch.arange(start, stop)
        chains.append(own if prefix < 0 else torch.cat([chains[prefix], own]))
    lengths = [stop - start for start, stop in pairwise(bounds)]
    rows = None if all(prefix < 0 for prefix in continued) else torch.cat(chains).to(device)
    return rows, Ragged.of(lengths, [len(chain) for chain in chains], device)


class _Buckets:
    """`PackedAttention` without one kernel for all: segments of about one length attend together."""

    def __init__(self, bounds: list[int], continued: list[int], device: torch.device) -> None:
        self._num_tokens = bounds[-1]
        self._segments = Segments(torch.tensor(bounds), torch.tensor(continued))
        together: dict[tuple[int, int], list[int]] = {}
        for segment, prefix in enumerate(continued):
            length = bounds[segment + 1] - bounds[segment]
            size = _padded_length(length) if prefix < 0 else _padded_rest(length)
            together.setdefault((prefix, size), []).append(segment)
        prefixes = sorted({prefix for prefix in continued if prefix >= 0})
        chains: dict[int, list[int]] = {-1: []}  # all that stands before, as places in `prefixes`
        for number, prefix in enumerate(prefixes):  # what a prefix continues is a prefix before it
            chains[prefix] = [*chains[continued[prefix]], number]
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        if can_attend(query):
            return TiledAttention.apply(query, key, value, self._segments, scale, window)
        seen = [tensor.split(self._around_prefixes)[1::2] for tensor in (key, value)]
        if not self._in_order:
            query, key, value = (_Rearrange.apply(tensor, self._rows, self._place) for tensor in (query, key, value))
        parts = []
        split = (tensor.split(self._sizes) for tensor in (query, key, value))
        for (segments, size, chain), *bucket in zip(self._buckets, *split, strict=True):
            queries, keys, values = (tensor.unflatten(0, (segments, size)) for tensor in bucket)
            before = [of_prefixes[i] for of_prefixes in seen for i in chain]
            parts.append(causal_attention(queries, keys, values, before, scale=scale, window=window).flatten(0, 1))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out if self._in_order else out.index_select(0, self._place)


def _padded_length(length: int) -> int:
    """Lengths that attend together: a multiple of 16, coarser for long samples so that at most an eighth is padding."""
    step = 1 << max(4, length.bit_length() - 4)
    return -(-length // step) * step


def _padded_rest(length: int) -> int:
    """The same for segments that continue a prefix. Only those of one prefix can attend together, so: powers of two."""
    return 1 << max(5, (length - 1).bit_length())


class _Rearrange(torch.autograd.Function):
    """Rows in bucket order, with padding copies. A padding copy has gradient zero, so backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None
