"""The attention of segments on a CPU with AMX, in bfloat16: c/attention.h."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.base import PackedSegments
from skyrl_train.ops.cpu.passes import SIDE, AttentionShape, Passes

NO_WINDOW = 2**62


class TiledAttention:
    """Implements `SegmentAttention` for heads that `fits` accepts."""

    def __init__(self, passes: Passes, segments: PackedSegments) -> None:
        self.passes = passes
        self._bounds, self._parents = torch.tensor(segments.bounds), torch.tensor(segments.parents)
        self.roots = torch.cat([torch.nonzero(self._parents < 0).flatten(), torch.tensor([len(self._parents)])])

    @staticmethod
    def fits(passes: Passes, query: Tensor) -> bool:
        """Return whether the kernels can attend with heads like query [T, heads, D]."""
        return passes.has_tiles and query.dtype == passes.dtype and query.shape[-1] % SIDE == 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        return _TiledAttention.apply(query, key, value, self, scale, window)

    def shape(self, query: Tensor, key: Tensor, scale: float, window: int | None) -> AttentionShape:
        """Return the structure that the kernels take. It points to tensors of this object."""
        return AttentionShape(
            self._bounds.data_ptr(),
            self._parents.data_ptr(),
            len(self._parents),
            query.shape[1],
            key.shape[1],
            query.shape[2],
            scale,
            NO_WINDOW if window is None else window,
        )


class _TiledAttention(torch.autograd.Function):
    """Runs the kernels: query [T, heads, D], key and value [T, kv_heads, D] -> [T, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: TiledAttention, scale: float, window: int | None
    ) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        out, normalizers = torch.empty_like(query), torch.empty(query.shape[:2])
        shape = attention.shape(query, key, scale, window)
        pointers = (tensor.data_ptr() for tensor in (query, key, value, out, normalizers))
        _checked(attention.passes.library.attend(ctypes.byref(shape), *pointers))
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.attention, ctx.scale, ctx.window = attention, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalizers = ctx.saved_tensors
        grad_out, roots = grads[0].contiguous(), ctx.attention.roots
        grad_inputs = [torch.empty_like(tensor) for tensor in (query, key, value)]
        shape = ctx.attention.shape(query, key, ctx.scale, ctx.window)
        pointers = (tensor.data_ptr() for tensor in (query, key, value, out, grad_out, normalizers, *grad_inputs))
        library = ctx.attention.passes.library
        _checked(library.attend_backward(ctypes.byref(shape), roots.data_ptr(), len(roots) - 1, *pointers))
        return *grad_inputs, None, None, None


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the scores of the attention: lower trainer.max_tokens_per_microbatch")
