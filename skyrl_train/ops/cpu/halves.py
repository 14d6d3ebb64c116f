"""A whole block in two autograd functions, before and behind its attention, for linear layers as they are.

Each keeps for its backward what products made, and computes again what costs one pass over memory: the norms and the
gated activations. Between its products it calls the kernels. The gradient of a weight goes where it is summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.ops.cpu.passes import kernels_of
from skyrl_train.ops.cpu.products import (
    gated_outputs,
    gradient_of_input,
    gradient_through_gate,
    normed_for,
    outputs,
    rows_of,
)
from skyrl_train.ops.weight_gradients import WeightGradient
from skyrl_train.policy.attention import Attention

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def is_plain(block: Any) -> bool:
    """Whether nothing but the block's own code wants to see what its parts compute."""
    attention, mlp = block.self_attn, block.mlp
    linear = [getattr(attention, name) for name in LINEAR[0]] + [getattr(mlp, name) for name in LINEAR[1]]
    return all(type(part) is nn.Linear for part in linear) and not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in (*linear, attention, mlp, block.input_layernorm, block.post_attention_layernorm)
    )


def block_of_halves(
    block: Any, row: Tensor, position_embeddings: tuple[Tensor, Tensor], attention: Attention
) -> Tensor:
    """row [T, hidden] -> the same after the block."""
    module, mlp, normed = block.self_attn, block.mlp, block.input_layernorm
    turn = tuple(part[0].contiguous() for part in position_embeddings)
    head_norms = (module.q_norm.weight, module.k_norm.weight) if hasattr(module, "q_norm") else (None, None)
    row, query, key, value = _BeforeAttention.apply(
        row,
        *turn,
        (module.head_dim, normed.variance_epsilon),
        normed.weight,
        *head_norms,
        *_parameters(module.q_proj, module.k_proj, module.v_proj),
    )
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    out = attention.attend(module.layer_idx, query, key, value, scale=module.scaling, window=window).flatten(1)
    normed = block.post_attention_layernorm
    parameters = _parameters(module.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return _BehindAttention.apply(row, out, normed.variance_epsilon, normed.weight, *parameters)


def _parameters(*layers: nn.Linear) -> list[Tensor | None]:
    """Their weights, then their biases."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


class _BeforeAttention(torch.autograd.Function):
    """Norm, three products, norms of the heads where the family has them, rotary positions.

    The row comes out again, so that what others do with it is added to its gradient here, in the pass of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        cosine: Tensor,
        sine: Tensor,
        settings: tuple[int, float],
        norm: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        *parameters: Any,  # weights, then biases or None
    ) -> tuple[Tensor, ...]:
        kernels, (head_dim, epsilon) = kernels_of(row), settings
        weights, biases = parameters[:3], parameters[3:]
        normed = normed_for(row, norm, epsilon, weights)
        raw = [y.unflatten(1, (-1, head_dim)) for y in outputs(normed, len(row), weights, biases)]
        query, key, value = raw
        if query_norm is not None and key_norm is not None:
            query, key = kernels.norm(query, query_norm, epsilon), kernels.norm(key, key_norm, epsilon)
        kept = raw[:2] if query_norm is not None else []
        ctx.save_for_backward(row, cosine, sine, norm, query_norm, key_norm, *weights, *kept)
        ctx.epsilon, ctx.gradients = epsilon, [WeightGradient.of(weight) for weight in weights]
        return row, kernels.rotated(query, cosine, sine), kernels.rotated(key, cosine, sine), value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row, cosine, sine, norm, query_norm, key_norm, *weights = ctx.saved_tensors
        kernels, epsilon = kernels_of(row), ctx.epsilon
        weights, raw = weights[:3], weights[3:]
        of_query, of_key = (kernels.rotated(grad, cosine, sine, back=True) for grad in grads[1:3])
        of_head_norms: list[Tensor | None] = [None, None]
        if raw:
            of_query, of_head_norms[0] = kernels.norm_backward(of_query, raw[0], query_norm, epsilon)
            of_key, of_head_norms[1] = kernels.norm_backward(of_key, raw[1], key_norm, epsilon)
        of_raw = [grad.flatten(1) for grad in (of_query, of_key, grads[3])]
        of_normed = gradient_of_input(of_raw, len(row), weights)
        of_row, of_norm = kernels.norm_backward(of_normed, row, norm, epsilon, grads[0].contiguous())
        normed = normed_for(row, norm, epsilon, weights)
        needs = ctx.needs_input_grad[7:]
        of_weights = WeightGradient.add(ctx.gradients, of_raw, normed, len(row), needs[:3])
        of_biases = [grad.sum(0) if needed else None for grad, needed in zip(of_raw, needs[3:], strict=True)]
        of_norms = [of_norm, *of_head_norms]
        cast = [None if grad is None else grad.to(row.dtype) for grad in of_norms]
        return of_row, None, None, None, *cast, *of_weights, *of_biases


class _BehindAttention(torch.autograd.Function):
    """The output product added to the row, norm, and the gated products, added again."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, out: Tensor, epsilon: float, norm: Tensor, *parameters: Any) -> Tensor:
        num_tokens = len(row)
        [w_out, w_gate, w_up, w_down], [b_out, b_gate, b_up, b_down] = parameters[:4], parameters[4:]
        [middle] = outputs(out, num_tokens, [w_out], [b_out], residual=row)
        normed = normed_for(middle, norm, epsilon, [w_gate, w_up])
        gate, up, gated = gated_outputs(normed, num_tokens, [w_gate, w_up], [b_gate, b_up])
        ctx.save_for_backward(middle, out, gate, up, norm, w_out, w_gate, w_up, w_down)
        ctx.epsilon, ctx.gradients = epsilon, [WeightGradient.of(weight) for weight in parameters[:4]]
        return outputs(gated, num_tokens, [w_down], [b_down], residual=middle)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        middle, out, gate, up, norm, w_out, w_gate, w_up, w_down = ctx.saved_tensors
        of_added, num_tokens = grads[0].contiguous(), len(middle)
        of_gate, of_up, gated = gradient_through_gate(of_added, w_down, gate, up)
        of_normed = gradient_of_input([of_gate, of_up], num_tokens, [w_gate, w_up])
        normed = normed_for(middle, norm, ctx.epsilon, [w_gate, w_up])
        of_row, of_norm = kernels_of(middle).norm_backward(of_normed, middle, norm, ctx.epsilon, of_added)
        needs = ctx.needs_input_grad[4:]
        places, of_ys = ctx.gradients, (of_row, of_gate, of_up, of_added)
        of_weights = [
            *WeightGradient.add(places[:1], of_ys[:1], out, num_tokens, needs[:1]),
            *WeightGradient.add(places[1:3], of_ys[1:3], normed, num_tokens, needs[1:3]),
            *WeightGradient.add(places[3:], of_ys[3:], gated, num_tokens, needs[3:4]),
        ]
        of_biases = [
            rows_of(of_y, num_tokens).sum(0) if needed else None for of_y, needed in zip(of_ys, needs[4:], strict=True)
        ]
        of_out = gradient_of_input([of_row], num_tokens, [w_out])
        return of_row, of_out, None, of_norm.to(norm.dtype), *of_weights, *of_biases
