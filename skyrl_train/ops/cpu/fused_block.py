"""A whole block in two autograd functions, before and behind its attention, for plain linear layers on a CPU.

Each keeps for its backward what matmuls made, and recomputes what costs one pass over memory: the norms and the gated
activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.ops.base import Attention
from skyrl_train.ops.cpu.passes import Passes
from skyrl_train.ops.reference import sliding_window, weight_and_epsilon

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def is_plain(block: Any) -> bool:
    """Return whether nothing but the block's own code wants to see what its parts compute."""
    attention, mlp = block.self_attn, block.mlp
    linear = [getattr(attention, name) for name in LINEAR[0]] + [getattr(mlp, name) for name in LINEAR[1]]
    return all(type(part) is nn.Linear for part in linear) and not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in (*linear, attention, mlp, block.input_layernorm, block.post_attention_layernorm)
    )


def fused_block(
    passes: Passes, block: Any, row: Tensor, position: tuple[Tensor, Tensor], attention: Attention
) -> Tensor:
    """Return the residual stream [T, hidden] after the block; `position`: cosine and sine, [T, D] each."""
    module, mlp = block.self_attn, block.mlp
    norm, epsilon = weight_and_epsilon(block.input_layernorm)
    head_norms = (module.q_norm.weight, module.k_norm.weight) if hasattr(module, "q_norm") else (None, None)
    row, query, key, value = _BeforeAttention.apply(
        passes,
        (module.head_dim, epsilon),
        row,
        *position,
        norm,
        *head_norms,
        *_parameters(module.q_proj, module.k_proj, module.v_proj),
    )
    window = sliding_window(module)
    out = attention.attend(module.layer_idx, query, key, value, scale=module.scaling, window=window).flatten(1)
    norm, epsilon = weight_and_epsilon(block.post_attention_layernorm)
    parameters = _parameters(module.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return _BehindAttention.apply(passes, epsilon, row, out, norm, *parameters)


def _parameters(*layers: nn.Linear) -> list[Tensor | None]:
    """Return their weights, then their biases."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


class _BeforeAttention(torch.autograd.Function):
    """Norm, three linear layers, norms of the heads where the family has them, rotary positions.

    Also returns the residual stream, so its gradient is added inside the norm's backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        settings: tuple[int, float],
        row: Tensor,
        cosine: Tensor,
        sine: Tensor,
        norm: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        *parameters: Any,  # weights, then biases or None
    ) -> tuple[Tensor, ...]:
        head_dim, epsilon = settings
        weights, biases = parameters[:3], parameters[3:]
        normed = passes.norm(row, norm, epsilon)
        raw = [F.linear(normed, w, b).unflatten(1, (-1, head_dim)) for w, b in zip(weights, biases, strict=True)]
        query, key, value = raw
        if query_norm is not None and key_norm is not None:
            query, key = passes.norm(query, query_norm, epsilon), passes.norm(key, key_norm, epsilon)
        kept = raw[:2] if query_norm is not None else []
        ctx.save_for_backward(row, cosine, sine, norm, query_norm, key_norm, *weights, *kept)
        ctx.passes, ctx.epsilon = passes, epsilon
        return row, passes.rotated(query, cosine, sine), passes.rotated(key, cosine, sine), value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row, cosine, sine, norm, query_norm, key_norm, *weights = ctx.saved_tensors
        passes, epsilon = ctx.passes, ctx.epsilon
        weights, raw = weights[:3], weights[3:]
        grad_query, grad_key = (passes.rotated(grad, cosine, sine, back=True) for grad in grads[1:3])
        grad_head_norms: list[Tensor | None] = [None, None]
        if raw:
            grad_query, grad_head_norms[0] = passes.norm_backward(grad_query, raw[0], query_norm, epsilon)
            grad_key, grad_head_norms[1] = passes.norm_backward(grad_key, raw[1], key_norm, epsilon)
        grad_raw = [grad.flatten(1) for grad in (grad_query, grad_key, grads[3])]
        grad_normed = _grad_input(grad_raw, weights)
        grad_row, grad_norm = passes.norm_backward(grad_normed, row, norm, epsilon, grads[0].contiguous())
        normed, needs = passes.norm(row, norm, epsilon), ctx.needs_input_grad[8:]
        grad_weights = _grad_weights(grad_raw, [normed] * 3, needs[:3])
        grad_biases = [grad.sum(0) if needed else None for grad, needed in zip(grad_raw, needs[3:], strict=True)]
        grad_norms = (None if grad is None else grad.to(row.dtype) for grad in (grad_norm, *grad_head_norms))
        return None, None, grad_row, None, None, *grad_norms, *grad_weights, *grad_biases


class _BehindAttention(torch.autograd.Function):
    """The output layer added to the residual stream, norm, and the gated layers, added again."""

    @staticmethod
    def forward(
        ctx: Any, passes: Passes, epsilon: float, row: Tensor, out: Tensor, norm: Tensor, *parameters: Any
    ) -> Tensor:
        [w_out, w_gate, w_up, w_down], [b_out, b_gate, b_up, b_down] = parameters[:4], parameters[4:]
        middle = F.linear(out, w_out, b_out).add_(row)
        normed = passes.norm(middle, norm, epsilon)
        gate, up = F.linear(normed, w_gate, b_gate), F.linear(normed, w_up, b_up)
        ctx.save_for_backward(middle, out, gate, up, norm, w_out, w_gate, w_up, w_down)
        ctx.passes, ctx.epsilon = passes, epsilon
        return F.linear(passes.swiglu(gate, up), w_down, b_down).add_(middle)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        middle, out, gate, up, norm, w_out, w_gate, w_up, w_down = ctx.saved_tensors
        passes, grad_added = ctx.passes, grads[0].contiguous()
        gated = grad_added @ w_down  # the gradient of the gated activations, overwritten by these
        grad_gate, grad_up = passes.swiglu_backward(gate, up, gated)
        grad_normed = _grad_input([grad_gate, grad_up], [w_gate, w_up])
        normed, needs = passes.norm(middle, norm, ctx.epsilon), ctx.needs_input_grad[5:]
        grad_row, grad_norm = passes.norm_backward(grad_normed, middle, norm, ctx.epsilon, grad_added)
        grad_ys = (grad_row, grad_gate, grad_up, grad_added)
        grad_weights = _grad_weights(grad_ys, (out, normed, normed, gated), needs[:4])
        grad_biases = [grad.sum(0) if needed else None for grad, needed in zip(grad_ys, needs[4:], strict=True)]
        return None, None, grad_row, grad_row @ w_out, grad_norm.to(norm.dtype), *grad_weights, *grad_biases


def _grad_input(grad_ys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the gradient [T, in] of what layers y = x W^T share, from those of their outputs, [T, out] each."""
    grad_x = grad_ys[0] @ weights[0]
    for grad_y, weight in zip(grad_ys[1:], weights[1:], strict=True):
        grad_x.addmm_(grad_y, weight)
    return grad_x


def _grad_weights(grad_ys: Sequence[Tensor], xs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients [out, in] of the weights of layers y = x W^T; None where one is not needed."""
    rows = zip(grad_ys, xs, needed, strict=True)
    return [grad_y.t() @ x if is_needed else None for grad_y, x, is_needed in rows]
