"""The blocks of the common model families for a processor: the same modules and weights, in few passes over memory.

transformers writes RMSNorm, rotary positions and SwiGLU as chains of small operations, most of them converting to
float32 and back. Each reads and writes a tensor of all tokens, forward and backward, and together they took longer than
the matrix products. Here each is one autograd function that computes in place and keeps only its inputs.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.ops import cuda
from skyrl_train.ops.cpu.halves import block_of_halves, is_plain
from skyrl_train.ops.cpu.passes import kernels_for
from skyrl_train.ops.weight_gradients import Embedded, GradientSum, Product
from skyrl_train.policy.attention import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}  # config.model_type


def has_known_blocks(config: Any) -> bool:
    """Whether this model's blocks are those that are written here, and in the engine's decoder."""
    return config.model_type in FAMILIES and getattr(config, "hidden_act", "silu") == "silu"


def has_quick_head(module: PreTrainedModel) -> bool:
    """Whether the output head is ours, which takes `out`."""
    return "forward" in vars(cast(Any, module.get_output_embeddings()))


def quicken_blocks(module: PreTrainedModel) -> None:
    """Let a model's blocks compute as below whenever they are handed one of our attention objects.

    Modules, parameters and their names stay, so an adapter in place of a linear layer is used as well. Models of other
    families are left alone.
    """
    if not has_known_blocks(module.config):
        return
    base = cast(Any, module.base_model)
    for block in base.layers:
        block.forward = MethodType(_block_forward, block)
    base.norm.forward = MethodType(_norm_forward, base.norm)
    embedding, head = cast(Any, module.get_input_embeddings()), cast(Any, module.get_output_embeddings())
    embedding.forward = MethodType(_embedding_forward, embedding)
    if type(head) is nn.Linear:
        head.forward = MethodType(_head_forward, head)


def _block_forward(
    block: Any,
    hidden_states: Tensor,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor],
    attention: Attention | None = None,
    **family: Any,
) -> Tensor:
    """hidden_states [1, T, hidden] -> the same after the block."""
    if attention is not None and _is_fused(hidden_states):
        return _fused_block(block, hidden_states[0], position_embeddings, attention)[None]
    if attention is None or hidden_states.device.type != "cpu":
        if attention is not None:
            family["attention"] = attention
        return type(block).forward(block, hidden_states, *args, position_embeddings=position_embeddings, **family)
    row = hidden_states[0]
    if kernels_for(row.dtype) is not None and is_plain(block):
        return block_of_halves(block, row, position_embeddings, attention)[None]
    row = row + _attend(block.self_attn, _normed(row, block.input_layernorm), position_embeddings, attention)
    mlp, normed = block.mlp, _normed(row, block.post_attention_layernorm)
    gate, up, down = mlp.gate_proj(normed), mlp.up_proj(normed), mlp.down_proj
    if type(down) is nn.Linear:
        return (row + _GatedDown.apply(gate, up, down.weight, down.bias))[None]
    return (row + down(_Gated.apply(gate, up)))[None]


def _is_fused(hidden: Tensor) -> bool:
    return hidden.device.type == "cuda" and cuda.has_fused_blocks()


def _fused_block(block: Any, row: Tensor, position_embeddings: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
    """row [T, hidden] -> the same after the block, on a GPU."""
    module, mlp = block.self_attn, block.mlp
    normed = cuda.normed(row, block.input_layernorm)
    query, key, value = _heads(module, normed)
    if hasattr(module, "q_norm"):
        query, key = cuda.normed(query, module.q_norm), cuda.normed(key, module.k_norm)
    query, key = cuda.rotated(query, key, *position_embeddings)
    attended = _attended(module, query, key, value, attention)
    normed, row = cuda.added_and_normed(attended, row, block.post_attention_layernorm)
    return row + mlp.down_proj(cuda.gated(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _attend(module: Any, row: Tensor, position_embeddings: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
    query, key, value = _heads(module, row)
    if hasattr(module, "q_norm"):
        query, key = _normed(query, module.q_norm), _normed(key, module.k_norm)
    cos, sin = (part[0, :, None] for part in position_embeddings)
    query, key = _Turned.apply(query, cos, sin), _Turned.apply(key, cos, sin)
    return _attended(module, query, key, value, attention)


def _heads(module: Any, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """row [T, hidden] -> queries [T, heads, D], keys and values [T, kv_heads, D]."""
    heads = (-1, module.head_dim)
    query, key, value = (p(row).unflatten(1, heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    return query, key, value


def _attended(module: Any, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """[T, hidden], behind the output projection."""
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    out = attention.attend(module.layer_idx, query, key, value, scale=module.scaling, window=window)
    return module.o_proj(out.flatten(1))


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    if _is_fused(hidden_states):
        return cuda.normed(hidden_states, norm)
    if hidden_states.device.type != "cpu":
        return type(norm).forward(norm, hidden_states)
    return _normed(hidden_states, norm)


def _head_forward(head: nn.Linear, hidden: Tensor, out: Tensor | None = None) -> Tensor:
    if hidden.device.type != "cpu" or hidden.ndim != 2:
        return F.linear(hidden, head.weight, head.bias)
    return Product.apply(hidden, head.weight, head.bias, out)


def _embedding_forward(embedding: nn.Embedding, input_ids: Tensor) -> Tensor:
    place = GradientSum.of(embedding.weight)
    if place is None or input_ids.device.type != "cpu" or not torch.is_grad_enabled():
        return nn.Embedding.forward(embedding, input_ids)
    return Embedded.apply(input_ids, embedding.weight, embedding.padding_idx, place)


def _normed(row: Tensor, norm: Any) -> Tensor:
    return _Normed.apply(row, norm.weight, norm.variance_epsilon)


class _Normed(torch.autograd.Function):
    """RMSNorm (arXiv 1910.07467, eq. 4): y = w x / rms(x).

    Backward is torch's kernel for LayerNorm, told that the mean is 0; its gradient through the mean is put back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        if (kernels := kernels_for(x.dtype)) is not None:
            ctx.save_for_backward(x.contiguous(), weight)
            return kernels.norm(x, weight, eps)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(weight.numel()).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(wide, scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, *scales = ctx.saved_tensors
        of_y = grads[0].contiguous()
        if (kernels := kernels_for(x.dtype)) is not None:
            of_x, of_weight = kernels.norm_backward(of_y, x, weight, ctx.eps)
            return of_x, of_weight.to(weight.dtype), None
        [scale] = scales
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            of_y, x, weight.shape, torch.zeros_like(scale), scale, weight.float(), None, [True, True, False]
        )
        through_mean = (of_y @ weight)[..., None] * scale / weight.numel()
        return of_x.add_(through_mean.to(of_x.dtype)), of_weight.to(weight.dtype), None


class _Turned(torch.autograd.Function):
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34), the two halves of a head being the pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, heads, D]; cos, sin [T, 1, D]"""
        ctx.save_for_backward(cos, sin)
        if (kernels := kernels_for(x.dtype)) is not None:
            return kernels.rotated(x, cos.contiguous(), sin.contiguous())
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        [of_out] = grads
        if (kernels := kernels_for(of_out.dtype)) is not None:
            return kernels.rotated(of_out, cos.contiguous(), sin.contiguous(), back=True), None, None
        half = of_out.shape[-1] // 2
        of_x = of_out * cos
        of_x[..., :half].addcmul_(of_out[..., half:], sin[..., half:])
        of_x[..., half:].addcmul_(of_out[..., :half], sin[..., :half], value=-1)
        return of_x, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up (SwiGLU, arXiv 2002.05202, eq. 5)"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        kernels = kernels_for(gate.dtype)
        return F.silu(gate) * up if kernels is None else kernels.swiglu(gate.contiguous(), up.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        [of_out] = grads
        if (kernels := kernels_for(gate.dtype)) is not None:
            return kernels.swiglu_backward(gate.contiguous(), up.contiguous(), of_out.clone())
        of_gate = torch.ops.aten.silu_backward(of_out * up, gate)
        return of_gate, F.silu(gate) * of_out


class _GatedDown(torch.autograd.Function):
    """The same and the product behind it, which needs it again in backward: there it costs little to compute."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.silu(gate) * up, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        [of_out] = grads
        of_gated = of_out @ weight
        of_gate = torch.ops.aten.silu_backward(of_gated * up, gate)
        opened = F.silu(gate)
        of_weight = of_out.t() @ (opened * up) if ctx.needs_input_grad[2] else None
        return of_gate, opened * of_gated, of_weight, of_out.sum(0) if ctx.has_bias else None
