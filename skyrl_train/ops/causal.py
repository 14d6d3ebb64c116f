"""Causal attention of samples of one length that continue the same prefixes, in torch, with a backward of its own.

torch's own backward for CPUs works on small tiles and took longer than all matrix products of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_ONCE = 256  # positions, in backward; what a block of queries cannot see is not computed for it
SCORES_AT_ONCE = 2**22  # numbers, likewise: 8 MiB in bfloat16


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, before: list[Tensor], *, scale: float, window: int | None
) -> Tensor:
    """Attend inside S samples: query [S, L, heads, D], key and value [S, L, kv_heads, D] -> [S, L, heads, D].

    `before`: the keys, then the values of each prefix that all samples continue, [P_i, kv_heads, D]. The query heads
    that share a key head become the heads of one batch entry, so keys are never repeated for them.
    """
    return _CausalAttention.apply(query, key, value, scale, window, *before)


def _grouped(query: Tensor, groups: int) -> Tensor:
    """Make every key head a batch entry: [S, L, groups * R, D] -> [S * groups, R, L, D]."""
    return query.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _samples(grouped: Tensor, samples: int) -> Tensor:
    """Undo `_grouped`: [S * groups, R, L, D] -> [S, L, groups * R, D]."""
    return grouped.unflatten(0, (samples, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _joined(own: Tensor, before: Sequence[Tensor]) -> Tensor:
    """Put prefixes [P_i, groups, D] before every sample's own [S, L, groups, D] -> [S * groups, P + L, D]."""
    parts = [*(part.expand(len(own), -1, -1, -1) for part in before), own]
    return torch.cat([part.transpose(1, 2) for part in parts], 2).flatten(0, 1)


def _grouped_causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend in E entries: query [E, R, L, D], key and value [E, P + L, D] -> [E, R, L, D].

    Under a mask the query heads become rows of one head, which repeats nothing and makes larger matmuls.
    """
    repeats, size = query.shape[1:3]
    num_keys = key.shape[1]
    if num_keys == size and (window is None or window >= size):
        key, value = (t[:, None].expand(-1, repeats, -1, -1) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = _is_seen(num_keys - size, size, 0, num_keys, window, query.device).repeat(repeats, 1)
    stacked = query.flatten(1, 2)[:, None]  # [E, 1, R*L, D]
    out = F.scaled_dot_product_attention(stacked, key[:, None], value[:, None], attn_mask=mask, scale=scale)
    return out.reshape(query.shape)


def _is_seen(
    first_query: int, num_queries: int, first_key: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor:
    """Return whether a query sees a key, by their positions: [queries, keys]."""
    queries = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
    distance = queries - torch.arange(first_key, first_key + num_keys, device=device)
    return (distance >= 0) & (distance < (window or first_query + num_queries))


class _CausalAttention(torch.autograd.Function):
    """`causal_attention` with a backward of plain matmuls, and nothing kept for it but the inputs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, *before: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, *before)
        ctx.scale, ctx.window = scale, window
        keys, values = _joined(key, before[: len(before) // 2]), _joined(value, before[len(before) // 2 :])
        return _samples(_grouped_causal(_grouped(query, key.shape[2]), keys, values, scale, window), len(query))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *before = ctx.saved_tensors
        samples, groups = len(query), key.shape[2]
        keys, values = _joined(key, before[: len(before) // 2]), _joined(value, before[len(before) // 2 :])
        grad_out = _grouped(grads[0], groups)
        grad_query, *grad_joined = _grouped_causal_backward(
            _grouped(query, groups), keys, values, grad_out, ctx.scale, ctx.window
        )
        sizes = [len(part) for part in before[: len(before) // 2]] + [key.shape[1]]
        grad_own: list[Tensor] = []
        grad_before: list[Tensor] = []
        for grad_all in grad_joined:
            *parts, own = grad_all.unflatten(0, (samples, groups)).transpose(1, 2).split(sizes, 1)
            grad_before += [part.sum(0, dtype=torch.float32).to(key.dtype) for part in parts]
            grad_own.append(own.to(key.dtype))
        return _samples(grad_query, samples), *grad_own, None, None, *grad_before


def _grouped_causal_backward(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query [E, R, L, D], key and value [E, P + L, D], the last two perhaps in float32.

    grad_out [E, R, L, D]. Computed for a block of queries at a time, with as many entries as make `SCORES_AT_ONCE`.
    """
    entries, repeats, size, _ = query.shape
    before = key.shape[1] - size
    grad_query = torch.empty_like(query)
    summed = torch.float32 if size > QUERIES_AT_ONCE else key.dtype
    grad_key, grad_value = (torch.zeros_like(t, dtype=summed) for t in (key, value))
    at_once = max(SCORES_AT_ONCE // (repeats * min(size, QUERIES_AT_ONCE) * key.shape[1]), 1)
    nothing = query.new_zeros(())
    for first in range(0, size, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, size)
        start = 0 if window is None else max(before + first - window + 1, 0)  # the first key that is seen
        unlike = before + first if window is None else start  # the first that is not seen by all
        is_seen = _is_seen(before + first, last - first, unlike, before + last - unlike, window, query.device)
        mask = query.new_zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf).repeat(repeats, 1)
        for entry in range(0, entries, at_once):
            here, seen = slice(entry, entry + at_once), (slice(entry, entry + at_once), slice(start, before + last))
            rows, grad_rows = (t[here, :, first:last].flatten(1, 2) for t in (query, grad_out))  # [e, R*l, D]
            keys, values = key[seen], value[seen]
            scores = torch.baddbmm(nothing, rows, keys.transpose(1, 2), beta=0, alpha=scale)
            scores[:, :, unlike - start :] += mask
            p = torch.softmax(scores, -1)
            grad_value[seen] += (p.transpose(1, 2) @ grad_rows).to(summed)
            grad_p = grad_rows @ values.transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_key[seen] += (grad_scores.transpose(1, 2) @ rows).to(summed)
            grad_query[here, :, first:last] = (grad_scores @ keys).unflatten(1, (repeats, -1))
    return grad_query.mul_(scale), grad_key.mul_(scale), grad_value
