"""The attention of a packed row through attention.h: on a processor with AMX, in bfloat16."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.cpu.passes import AttentionShape, kernels_of, kernels_with_tiles

NO_WINDOW = 2**62


@dataclass(frozen=True)
class Segments:
    """Segment n is tokens [bounds[n], bounds[n+1]) and continues segment before[n], -1 if none (int64).

    A tree of segments begins with one that continues none.
    """

    bounds: Tensor  # [N+1]
    before: Tensor  # [N]

    @property
    def roots(self) -> Tensor:
        """[trees + 1]: the first segment of each tree, then N."""
        return torch.cat([torch.nonzero(self.before < 0).flatten(), torch.tensor([len(self.before)])])

    def shape(self, query: Tensor, key: Tensor, scale: float, window: int | None) -> AttentionShape:
        """As the kernels take it. Keep this object as long as they use it."""
        return AttentionShape(
            self.bounds.data_ptr(),
            self.before.data_ptr(),
            len(self.before),
            query.shape[1],
            key.shape[1],
            query.shape[2],
            scale,
            NO_WINDOW if window is None else window,
        )


def can_attend(query: Tensor) -> bool:
    """query [T, heads, D]"""
    return kernels_with_tiles(query) is not None


class TiledAttention(torch.autograd.Function):
    """query [T, heads, D], key and value [T, kv_heads, D] -> [T, heads, D]"""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        out, normalizers = torch.empty_like(query), torch.empty(query.shape[:2])
        shape = segments.shape(query, key, scale, window)
        pointers = (tensor.data_ptr() for tensor in (query, key, value, out, normalizers))
        _checked(kernels_of(query).library.attend(ctypes.byref(shape), *pointers))
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalizers = ctx.saved_tensors
        of_out, roots = grads[0].contiguous(), ctx.segments.roots
        of_inputs = [torch.empty_like(tensor) for tensor in (query, key, value)]
        shape = ctx.segments.shape(query, key, ctx.scale, ctx.window)
        pointers = (tensor.data_ptr() for tensor in (query, key, value, out, of_out, normalizers, *of_inputs))
        _checked(
            kernels_of(query).library.attend_backward(ctypes.byref(shape), roots.data_ptr(), len(roots) - 1, *pointers)
        )
        return *of_inputs, None, None, None


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the scores of the attention: lower trainer.max_tokens_per_microbatch")
