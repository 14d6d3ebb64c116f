"""The operations of a pass on a CPU, compiled from C: each reads and writes memory once, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.ops.base import (
    AdamWSettings,
    Attention,
    Decoder,
    Draw,
    MasterWeight,
    PackedSegments,
    SegmentAttention,
)
from skyrl_train.ops.bucketed_attention import bucketed_attention
from skyrl_train.ops.cpu import huge_pages
from skyrl_train.ops.cpu.decoder import decoders
from skyrl_train.ops.cpu.fused_block import fused_block, is_plain
from skyrl_train.ops.cpu.passes import Passes, passes_for
from skyrl_train.ops.cpu.tiled_attention import TiledAttention
from skyrl_train.ops.reference import Reference


def cpu_ops(dtype: torch.dtype) -> CpuOps | None:
    """Return the compiled operations; None: this type is another, or this machine has no C compiler."""
    passes = passes_for(dtype)
    return None if passes is None else _ops_of(passes)


@cache
def _ops_of(passes: Passes) -> CpuOps:
    return CpuOps(passes)


class CpuOps(Reference):
    """Implements `Ops` with c/passes.c."""

    keeps_buffers = True

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return _Norm.apply(self._passes, x, weight, epsilon)

    def rotate(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = cosine.contiguous(), sine.contiguous()
        return _Rotate.apply(self._passes, query, cosine, sine), _Rotate.apply(self._passes, key, cosine, sine)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return _Gate.apply(self._passes, gate, up)

    def block(self, block: Any, row: Tensor, position: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        if not is_plain(block):
            return super().block(block, row, position, attention)
        cosine, sine = position
        return fused_block(self._passes, block, row, (cosine.contiguous(), sine.contiguous()), attention)

    def segment_attention(self, segments: PackedSegments, device: torch.device) -> SegmentAttention:
        return CpuAttention(self._passes, segments, device)

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        if not logits.is_contiguous():
            return super().logprobs(logits, targets, temperature)
        return self._passes.logprobs(logits, targets, temperature)

    def logprobs_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        normalizers: Tensor,
        entropies: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropies: Tensor | None,
    ) -> None:
        given = (logits, targets, temperature, normalizers, entropies)
        if not logits.is_contiguous():
            super().logprobs_backward(*given, grad_logprobs, grad_entropies)
            return
        pull = torch.zeros_like(normalizers) if grad_logprobs is None else grad_logprobs
        self._passes.logprobs_backward(*given, pull, grad_entropies)

    def round_masters(self, masters: Tensor, first: int = 0) -> Tensor:
        if self._passes.dtype != torch.bfloat16:
            return super().round_masters(masters, first)
        weights = torch.empty(masters.shape, dtype=torch.bfloat16)
        self._passes.dither(masters.detach().contiguous(), weights, first)
        return weights

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        return math.sqrt(math.fsum(map(self._passes.square_sum, gradients)))

    @torch.no_grad()
    def adamw(self, weights: Sequence[MasterWeight], settings: AdamWSettings) -> None:
        ours = [weight for weight in weights if weight.parameter.is_contiguous()]
        for weight in ours:
            weight.step.add_(1)
            self._passes.adamw(weight, settings)
        super().adamw([weight for weight in weights if not weight.parameter.is_contiguous()], settings)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return huge_pages.zeros(shape, dtype)

    def decoders(
        self, module: nn.Module, weight_of: Callable[[nn.Linear], Tensor]
    ) -> Iterator[tuple[Decoder, Draw | None]]:
        return decoders(module, weight_of)


class CpuAttention:
    """Implements `SegmentAttention`: in AMX tiles where the CPU has them and the heads fit, else in torch."""

    def __init__(self, passes: Passes, segments: PackedSegments, device: torch.device) -> None:
        self._passes, self._segments, self._device = passes, segments, device

    @cached_property
    def _tiled(self) -> SegmentAttention:
        return TiledAttention(self._passes, self._segments)

    @cached_property
    def _bucketed(self) -> SegmentAttention:
        return bucketed_attention(self._segments, self._device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        attention = self._tiled if TiledAttention.fits(self._passes, query) else self._bucketed
        return attention(query, key, value, scale=scale, window=window)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.passes, ctx.epsilon = passes, epsilon
        ctx.save_for_backward(x.contiguous(), weight)
        return passes.norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = ctx.passes.norm_backward(grads[0].contiguous(), x, weight, ctx.epsilon)
        return None, grad_x, grad_weight.to(weight.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(cosine, sine)
        return passes.rotated(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.passes.rotated(grads[0], *ctx.saved_tensors, back=True), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.passes = passes
        ctx.save_for_backward(gate, up)
        return passes.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        grad_y = grads[0].clone(memory_format=torch.contiguous_format)  # is overwritten
        return None, *ctx.passes.swiglu_backward(*ctx.saved_tensors, grad_y)
