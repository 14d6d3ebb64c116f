"""Logprobs and entropies of chosen tokens, without ever holding the logits of all of them.

The head makes [tokens, vocab] numbers from [tokens, hidden]; for a large vocabulary that is most of the memory of a
step. So only the trained tokens go through it, a chunk at a time, and backward computes each chunk's logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.batch.prefix_tree import share_prefixes
from skyrl_train.ops import ops_for
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.model import Policy
from skyrl_train.types import Batch

BYTES_PER_CHUNK = 2**28  # of logits; forward leaves the last chunk for backward
SHARE_OF_GPU = 1 / 32  # of a GPU's memory, likewise: each chunk adds the head's whole gradient, so few are faster


def batch_logprobs(
    policy: Policy, batch: Batch, *, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of one forward pass of the policy, [T] float32, 0 wherever loss_mask is False.

    A prefix that samples share is computed once. Entropies are 0 too without `with_entropy`. The batch is on the host
    or on the policy's device, where the results are; on the host it spares a GPU being asked for its numbers.
    """
    segments, device = share_prefixes(batch), policy.device
    attention = PackedAttention(segments.offsets, segments.before, device)
    ids, positions = segments.input_ids.to(device), segments.position_ids.to(device)
    hidden = policy.hidden_states(ids, positions, attention)
    tokens = torch.nonzero(batch.loss_mask).flatten()
    predicts = segments.row[tokens - 1].to(device)  # what stands before a token predicts it; samples may share it
    targets, tokens = batch.input_ids[tokens].to(device), tokens.to(device)
    head = policy.module.get_output_embeddings()
    logprobs, entropies = chunked_logprobs(
        hidden.float().index_select(0, predicts).to(hidden.dtype),  # so that backward sums in float32
        targets,
        policy.logits,
        [] if head is None else [parameter for parameter in head.parameters() if parameter.requires_grad],
        temperature=temperature,
        with_entropy=with_entropy,
        keeps_buffer=policy.head_takes_out and ops_for(device, policy.compute_dtype).keeps_buffers,
        vocab_size=getattr(head, "out_features", None),
    )
    zeros = logprobs.new_zeros(batch.num_tokens)
    return zeros.index_put((tokens,), logprobs), zeros.index_put((tokens,), entropies)


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[..., Tensor],
    head_parameters: list[nn.Parameter],
    *,
    temperature: float,
    with_entropy: bool = False,
    logits_per_chunk: int | None = None,
    keeps_buffer: bool = False,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and entropy under softmax(head(hidden) / temperature), [N] float32.

    hidden [N, hidden], targets [N].

    Both have gradients to `hidden` and to the `head_parameters`, the parameters that `head` uses.
    `keeps_buffer`: head takes `out`, where to write the logits, and that memory is kept for the next logits. Without
    `vocab_size`, one token more goes through the head to see how many there are.
    """
    settings = _Settings(
        head, temperature, with_entropy, logits_per_chunk, keeps_buffer, vocab_size, torch.is_grad_enabled()
    )
    return _ChunkedLogprobs.apply(hidden, targets, settings, *head_parameters)


@dataclass(frozen=True, slots=True)
class _Settings:
    head: Callable[..., Tensor]
    temperature: float
    with_entropy: bool
    logits_per_chunk: int | None
    keeps_buffer: bool
    vocab_size: int | None
    has_backward: bool


_buffers: list[Tensor] = []  # memory of logits that are done: new memory of that size costs as much as the softmax


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, settings: _Settings, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        vocabulary = settings.vocab_size or (settings.head(hidden[:1]).shape[-1] if len(hidden) else 1)
        ctx.chunk = max((settings.logits_per_chunk or _logits_per_chunk(hidden)) // vocabulary, 1)
        ctx.settings, ctx.parameters, ctx.last, ctx.buffer = settings, parameters, None, None
        if settings.keeps_buffer:
            ctx.buffer = _buffer(min(len(hidden), ctx.chunk), vocabulary, hidden.dtype)
        ctx.set_materialize_grads(False)
        logprobs, normalizers, entropies = (torch.zeros(len(hidden), device=hidden.device) for _ in range(3))
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            ctx.last = None  # frees the chunk before
            ctx.last = _through_head(settings.head, hidden[part], ctx.buffer)
            logits = ctx.last[1].detach()
            found = ops_for(logits.device, logits.dtype).logprobs(logits, targets[part], settings.temperature)
            for all_rows, rows in zip((logprobs, normalizers, entropies), found, strict=True):
                all_rows[part] = rows
            del logits  # which ctx.last alone holds then
        ctx.save_for_backward(hidden, targets, normalizers, entropies)
        if not settings.has_backward:
            _give_back(ctx)
        return logprobs, entropies if settings.with_entropy else torch.zeros_like(entropies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, normalizers, entropies = ctx.saved_tensors
        grad_logprobs, grad_entropies = grads
        temperature = ctx.settings.temperature
        grad_hidden = torch.zeros_like(hidden)
        grad_parameters = [torch.zeros_like(parameter) for parameter in ctx.parameters if not len(hidden)]
        for start in reversed(range(0, len(hidden), ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            leaf, logits = ctx.last or _through_head(ctx.settings.head, hidden[part], ctx.buffer)
            ctx.last = None
            grad_logits = logits.detach()  # in place: nobody needs the values any more, or autograd objects
            given = (targets[part], temperature, normalizers[part], entropies[part])
            pulls = (None if grad is None else grad[part].contiguous() for grad in (grad_logprobs, grad_entropies))
            ops_for(logits.device, logits.dtype).logprobs_backward(grad_logits, *given, *pulls)
            inputs = [leaf, *ctx.parameters]
            grad_leaf, *grad_head = torch.autograd.grad(logits, inputs, grad_logits, allow_unused=True)
            del leaf, logits, grad_logits, inputs  # before the next chunk's logits
            grad_hidden[part] = grad_leaf
            if len(hidden) > ctx.chunk:  # summed in float32
                grad_head = [None if grad_chunk is None else grad_chunk.float() for grad_chunk in grad_head]
            grad_parameters = list(map(_sum, grad_parameters, grad_head)) if grad_parameters else grad_head
        _give_back(ctx)
        cast = [
            None if total is None else total.to(parameter.dtype)  # None: the head has summed it where it is kept
            for total, parameter in zip(grad_parameters, ctx.parameters, strict=True)
        ]
        return grad_hidden, None, None, *cast


def _logits_per_chunk(hidden: Tensor) -> int:
    num_bytes = BYTES_PER_CHUNK
    if hidden.device.type == "cuda" and torch.cuda.is_available():  # a pretended one has no size
        num_bytes = max(num_bytes, int(SHARE_OF_GPU * torch.cuda.get_device_properties(hidden.device).total_memory))
    return num_bytes // hidden.itemsize


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return None if total is None or more is None else total.add_(more)


def _through_head(head: Callable[..., Tensor], hidden: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a copy of `hidden` [n, hidden] that is a leaf, and its logits [n, vocab]."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        return leaf, head(leaf) if buffer is None else head(leaf, out=buffer[: len(hidden)])


def _buffer(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor [rows, vocabulary] that nobody else writes to until it is given back."""
    while _buffers:
        buffer = _buffers.pop()
        if buffer.dtype == dtype and buffer.shape[1] == vocabulary and len(buffer) >= rows:
            return buffer
    return torch.empty((rows, vocabulary), dtype=dtype)


def _give_back(ctx: Any) -> None:
    ctx.last = None
    if ctx.buffer is not None:
        _buffers.append(ctx.buffer)
        ctx.buffer = None
