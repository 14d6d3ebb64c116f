"""Triton kernels for what would take torch ten passes over memory: the softmax of the head, and rounding of weights.

Import it only where `ops.cuda.has_triton()`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrl_train.ops.cuda_decode import on

BLOCK = 4096  # numbers of a row at once


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `Ops.logprobs` in one pass: the sums follow the largest number seen so far (arXiv 1805.02867)."""
    found = torch.empty((3, len(logits)), dtype=torch.float32, device=logits.device)
    if len(logits):
        with on(logits.device):
            _statistics[(len(logits),)](
                logits, logits.stride(0), targets, *found, logits.shape[1], 1 / temperature, BLOCK=BLOCK, num_warps=8
            )
    logprobs, normalizers, entropies = found
    return logprobs, normalizers, entropies


def into_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    normalizers: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
) -> None:
    """Write the gradient of the logits over them, from those of log p(target) and of the entropy, [n] each.

    d log p(target) / dz = [target] - p,  dH / dz = -p (log p + H)
    """
    if not len(logits):
        return
    nothing = torch.zeros_like(normalizers) if grad_logprobs is None or grad_entropies is None else normalizers
    with on(logits.device):
        _into_gradient[(len(logits), triton.cdiv(logits.shape[1], BLOCK))](
            logits,
            logits.stride(0),
            targets,
            normalizers,
            entropies,
            nothing if grad_logprobs is None else grad_logprobs,
            nothing if grad_entropies is None else grad_entropies,
            logits.shape[1],
            1 / temperature,
            BLOCK=BLOCK,
            num_warps=8,
        )


def dither(masters: Tensor, weights: Tensor, first: int) -> None:
    """Write masters [n] float32 into weights [n] bfloat16, rounded as `Reference.round_masters` says."""
    if len(masters):
        grid = (triton.cdiv(len(masters), BLOCK),)
        with on(masters.device):
            _dither[grid](masters, weights, len(masters), first, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _statistics(logits, row_stride, targets, logprobs, normalizers, entropies, vocabulary, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    top = -float("inf")
    total = 0.0  # of exp(z - top)
    weighted = 0.0  # of exp(z - top) * (z - top)
    for start in range(0, vocabulary, BLOCK):
        places = start + tl.arange(0, BLOCK)
        is_token = places < vocabulary
        z = tl.load(logits + places, mask=is_token, other=-float("inf")).to(tl.float32) * scale
        new_top = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - new_top)
        lift = tl.where(total > 0.0, top - new_top, 0.0)
        weighted = shrink * (weighted + total * lift)
        total = total * shrink
        z -= new_top
        e = tl.exp(z)
        total += tl.sum(e, 0)
        weighted += tl.sum(tl.where(is_token & (e > 0.0), e * z, 0.0), 0)
        top = new_top
    z = tl.load(logits + tl.load(targets + row)).to(tl.float32) * scale
    log_total = tl.log(total)
    tl.store(logprobs + row, z - top - log_total)
    tl.store(normalizers + row, top + log_total)
    tl.store(entropies + row, log_total - weighted / total)


@triton.jit
def _into_gradient(
    logits,
    row_stride,
    targets,
    normalizers,
    entropies,
    grad_logprobs,
    grad_entropies,
    vocabulary,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = places < vocabulary
    here = logits + row * row_stride + places
    log_p = tl.load(here, mask=is_token, other=-float("inf")).to(tl.float32) * scale - tl.load(normalizers + row)
    p = tl.exp(log_p)
    pull = tl.load(grad_logprobs + row)
    pull_entropy = tl.load(grad_entropies + row)
    falls = tl.where(p > 0.0, p * (pull + pull_entropy * (log_p + tl.load(entropies + row))), 0.0)
    grad = tl.where(places == tl.load(targets + row), pull, 0.0) - falls
    tl.store(here, (grad * scale).to(logits.dtype.element_ty), mask=is_token)


@triton.jit
def _dither(masters, weights, count, first, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_weight = places < count
    bits = tl.load(masters + places, mask=is_weight, other=0.0).to(tl.uint32, bitcast=True)
    threshold = ((places + first).to(tl.uint32) * 2654435761 + 0x80000000) >> 16  # the golden ratio, see reference.py
    cut_off = (bits + threshold) & 0xFFFF0000
    tl.store(weights + places, cut_off.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=is_weight)
