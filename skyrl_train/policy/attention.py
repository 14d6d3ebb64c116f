"""The attention hook of the policy: every layer hands its queries, keys and values to an object that the caller chose.

The learner passes `PackedAttention` (samples end to end, shared prefixes once, nothing cached), the engine its
`CachedAttention`. Both use the same weights and the same forward code of the model family; no mask tensor is ever built
by transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.ops import ops_for
from skyrl_train.ops.base import Attention, PackedSegments, SegmentAttention
from skyrl_train.policy.refusal import ModelRefused

ATTENTION_NAME = "skyrl"  # as transformers knows it; it has no mask function there, so models build no mask


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
    """Hand the heads of a layer to `attention`, in the shapes of transformers.

    query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D].
    """
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
    is a sequence of its own. What a device does about that is in ops/.
    """

    def __init__(self, offsets: Tensor, before: Tensor | None = None, device: torch.device | None = None) -> None:
        """Take `device` as that of the tokens; by default it is that of `offsets`."""
        bounds = offsets.tolist()
        self._segments = PackedSegments(bounds, [-1] * (len(bounds) - 1) if before is None else before.tolist())
        self._device = device or offsets.device
        self._by_dtype: dict[torch.dtype, SegmentAttention] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        num_tokens = self._segments.num_tokens
        if query.shape[0] != num_tokens:
            raise ValueError(f"{query.shape[0]} tokens, but the offsets of PackedAttention end at {num_tokens}")
        if (attention := self._by_dtype.get(query.dtype)) is None:
            attention = ops_for(self._device, query.dtype).segment_attention(self._segments, self._device)
            self._by_dtype[query.dtype] = attention
        return attention(query, key, value, scale=scale, window=window)
