"""Logprobs and entropies of rows of logits, and the way back in place of the logits: with kernels, or with torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from skyrl_train.ops.cpu.passes import Kernels, kernels_for
from skyrl_train.ops.cuda import has_triton

NUMBERS_IN_CACHE = 2**20  # float32 numbers that a processor's core keeps close: a softmax walks over them several times


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, vocab], targets [n] -> under softmax(logits / temperature): log p(target), the logarithm of the sum of
    exponentials, the entropy, each [n] float32."""
    if (kernels := _kernels(logits)) is not None:
        return kernels.logprobs(logits, targets, temperature)
    if _has_gpu_kernels(logits):
        from skyrl_train.ops import cuda_kernels

        return cuda_kernels.statistics(logits, targets, temperature)
    logprobs, normalizers, entropies = (torch.empty(len(logits), device=logits.device) for _ in range(3))
    for here, scaled, p in _in_cache(logits, temperature):
        torch.softmax(scaled, 1, out=p)
        normalizers[here] = scaled.amax(1) - p.amax(1).log()
        scaled -= normalizers[here, None]
        logprobs[here] = scaled.gather(1, targets[here, None])[:, 0]
        entropies[here] = -torch.linalg.vecdot(p, scaled)
    return logprobs, normalizers, entropies


def into_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    normalizers: Tensor,
    entropies: Tensor,
    of_logprobs: Tensor | None,
    of_entropies: Tensor | None,
) -> None:
    """Write the gradient of the logits over them, from those of log p(target) and of the entropy, [n] each.

    d log p(target) / dz = [target] - p,  dH / dz = -p (log p + H)
    """
    if (kernels := _kernels(logits)) is not None:
        pull = torch.zeros_like(normalizers) if of_logprobs is None else of_logprobs
        kernels.logprobs_backward(logits, targets, temperature, normalizers, entropies, pull, of_entropies)
        return
    if _has_gpu_kernels(logits):
        from skyrl_train.ops import cuda_kernels

        cuda_kernels.into_gradient(logits, targets, temperature, normalizers, entropies, of_logprobs, of_entropies)
        return
    pulls = (None if grad is None else grad[:, None] / temperature for grad in (of_logprobs, of_entropies))
    of_logprobs, of_entropies = pulls
    for rows, scaled, p in _in_cache(logits, temperature):
        log_p = scaled.sub_(normalizers[rows, None])
        torch.exp(log_p, out=p)
        pull = 0.0 if of_logprobs is None else of_logprobs[rows]
        if of_entropies is not None:
            pull = log_p.add_(entropies[rows, None]).mul_(of_entropies[rows]).add_(pull)
        p.mul_(pull).neg_()
        if of_logprobs is not None:
            p.scatter_add_(1, targets[rows, None], of_logprobs[rows])
        logits[rows] = p


def _kernels(logits: Tensor) -> Kernels | None:
    return kernels_for(logits.dtype) if logits.device.type == "cpu" and logits.is_contiguous() else None


def _has_gpu_kernels(logits: Tensor) -> bool:
    return logits.device.type == "cuda" and has_triton() and logits.stride(1) == 1


def _in_cache(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits[rows] / temperature in float32, room for as many numbers): on a processor so few rows that the
    softmax walks over them in its cache. Both tensors are used again for the next rows."""
    count, vocabulary = logits.shape
    step = min(max(NUMBERS_IN_CACHE // vocabulary, 1), count) if logits.device.type == "cpu" else count
    room = torch.empty(2, step, vocabulary, device=logits.device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scaled, spare = room[:, : rows.stop - start]
        scaled.copy_(logits[rows])
        if temperature != 1:
            scaled /= temperature
        yield rows, scaled, spare
