"""Every operation of a pass in plain torch: what a reader reads, and what every faster one is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from skyrl_train.ops.base import AdamWSettings, Attention, Decoder, Draw, MasterWeight, PackedSegments, SegmentAttention
from skyrl_train.ops.ragged import RepeatedRows, gathered_keys, ragged_attention
from skyrl_train.ops.recomputed import recomputed

GOLDEN = 2654435761 - 2**32  # 2^32 over the golden ratio, as an int32: its multiples spread evenly (Knuth, 6.4)
ROUNDED_AT_ONCE = 2**24  # numbers, which bounds the memory
SOFTMAX_AT_ONCE = 2**20  # numbers, which stay in the cache of a CPU core: a softmax walks over them several times


class Reference:
    """Implements `Ops` on every device and in every type. The faster ones inherit what they do not replace."""

    keeps_buffers = False
    recomputes = False  # whether what norm and gate give is made again in backward: cheap where each is one kernel

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add(epsilon).rsqrt()
        return (wide * scale * weight.float()).to(x.dtype)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        row = x + residual
        return self.norm(row, weight, epsilon), row

    def rotate(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        return _rotated(query, cosine[:, None], sine[:, None]), _rotated(key, cosine[:, None], sine[:, None])

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def block(self, block: Any, row: Tensor, position: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        module, mlp = block.self_attn, block.mlp
        normed = self.norm(row, *weight_and_epsilon(block.input_layernorm))
        heads = (-1, module.head_dim)
        with self._recomputed(block, normed, partial(self._normed, block.input_layernorm, row.detach())):
            query, key, value = (p(normed).unflatten(1, heads) for p in (module.q_proj, module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            query = self.norm(query, *weight_and_epsilon(module.q_norm))
            key = self.norm(key, *weight_and_epsilon(module.k_norm))
        query, key = self.rotate(query, key, *position)
        out = attention.attend(module.layer_idx, query, key, value, scale=module.scaling, window=sliding_window(module))
        attended = module.o_proj(out.flatten(1))
        normed, row = self.add_norm(attended, row, *weight_and_epsilon(block.post_attention_layernorm))
        with self._recomputed(block, normed, partial(self._normed, block.post_attention_layernorm, row.detach())):
            gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        gated = self.gate(gate, up)
        with self._recomputed(block, gated, partial(self.gate, gate.detach(), up.detach())):
            return row + mlp.down_proj(gated)

    def _recomputed(self, block: Any, tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Return the context in which `tensor` is not kept for backward.

        In training mode the block as a whole is computed again (gradient checkpointing), and keeps nothing.
        """
        return recomputed(tensor, make) if self.recomputes and not block.training else nullcontext()

    def _normed(self, norm: Any, row: Tensor) -> Tensor:
        return self.norm(row, *weight_and_epsilon(norm))

    def segment_attention(self, segments: PackedSegments, device: torch.device) -> SegmentAttention:
        rows, ragged = gathered_keys(segments, device)

        def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
            if rows is not None:
                key, value = RepeatedRows.apply(key, rows), RepeatedRows.apply(value, rows)
            return ragged_attention(query, key, value, ragged, scale=scale, window=window)

        return attend

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, normalizers, entropies = (torch.empty(len(logits), device=logits.device) for _ in range(3))
        for rows in _row_blocks(logits):
            scaled = logits[rows].float() / temperature
            normalizers[rows] = scaled.logsumexp(1)
            log_p = scaled.sub_(normalizers[rows, None])
            logprobs[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            entropies[rows] = -torch.linalg.vecdot(log_p.exp(), log_p)
        return logprobs, normalizers, entropies

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
        for rows in _row_blocks(logits):
            log_p = logits[rows].float() / temperature - normalizers[rows, None]
            p, grad = log_p.exp(), torch.zeros_like(log_p)
            if grad_logprobs is not None:
                pull = grad_logprobs[rows, None]
                grad = (p * -pull).scatter_add_(1, targets[rows, None], pull)
            if grad_entropies is not None:
                grad -= p * (log_p + entropies[rows, None]) * grad_entropies[rows, None]
            logits[rows] = (grad / temperature).to(logits.dtype)

    def round_masters(self, masters: Tensor, first: int = 0) -> Tensor:
        """Round float32 masters to bfloat16 so that small updates are felt at once.

        Pretrained weights lie on bfloat16's grid, whose steps are up to 1/128 of a weight. Rounded to the nearest, a
        weight stands still until its master has come half a step far: at a learning rate of 1e-5 that takes most
        weights ten updates and more. Here each weight has a threshold of its own between 0 and 1 and goes over to the
        next number of the grid when its master has come that part of the step. The thresholds are spread evenly, so the
        weights together move as their masters do, from the first update on (stochastic rounding, Gupta et al., 2015,
        section 2, with a fixed sequence in the place of random numbers). A master on the grid is copied as it is.

        Number i becomes the master plus u_i of a step, cut off, with u_i = (i / golden ratio + 1/2) mod 1. On echo_env
        three seeds came to 0.95 of the reward in 9, 8 and 6 updates; rounded to the nearest, one took 18. The first of
        the masters is number `first` of the whole tensor, so a shard is rounded as a part of the whole.
        """
        numbers = masters.detach().contiguous().view(-1)
        weights = torch.empty(masters.shape, dtype=torch.bfloat16, device=masters.device)
        flat = weights.view(-1)
        for start in range(0, len(numbers), ROUNDED_AT_ONCE):
            bits = numbers[start : start + ROUNDED_AT_ONCE].view(torch.int32)
            index = torch.arange(first + start, first + start + len(bits), device=bits.device).to(torch.int32)
            thresholds = (index.mul_(GOLDEN).add_(-(2**31)) >> 16) & 0xFFFF
            cut_off = ((bits + thresholds) & -0x10000).view(torch.float32)
            flat[start : start + len(bits)] = cut_off.to(torch.bfloat16)
        return weights

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def adamw(self, weights: Sequence[MasterWeight], settings: AdamWSettings) -> None:
        if not weights:
            return
        if settings.clip != 1:
            for weight in weights:
                weight.grad.mul_(settings.clip)
        adamw(
            [weight.master for weight in weights],
            [weight.grad for weight in weights],
            [weight.exp_avg for weight in weights],
            [weight.exp_avg_sq for weight in weights],
            [],
            [weight.step for weight in weights],
            fused=True,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            maximize=False,
        )
        for weight in weights:
            if weight.parameter is not weight.master:
                weight.parameter.copy_(self.rounded(weight.master, weight.parameter.dtype))

    def rounded(self, masters: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
        """Return float32 masters in another type: bfloat16 by `round_masters`, any other rounded to the nearest."""
        return self.round_masters(masters, first) if dtype == torch.bfloat16 else masters.to(dtype)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def decoders(
        self, module: nn.Module, weight_of: Callable[[nn.Linear], Tensor]
    ) -> Iterator[tuple[Decoder, Draw | None]]:
        """Yield none: the engine computes with the model itself."""
        return iter(())


def weight_and_epsilon(norm: Any) -> tuple[Tensor, float]:
    """Return what `norm` of the protocol wants of a transformers module."""
    return norm.weight, norm.variance_epsilon


def sliding_window(module: Any) -> int | None:
    """Return the window of a transformers attention module; None: it sees everything before a token."""
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the rows, so few at a time that float32 copies of them are small."""
    count, vocabulary = logits.shape
    step = max(SOFTMAX_AT_ONCE // max(vocabulary, 1), 1) if logits.device.type == "cpu" else max(count, 1)
    for start in range(0, count, step):
        yield slice(start, start + step)
