"""The blocks of the common model families, computed by ops/: the same modules and weights, in few passes over memory.

transformers writes RMSNorm, rotary positions and SwiGLU as chains of small operations, most of them converting to
float32 and back. Each reads and writes a tensor of all tokens, forward and backward, and together they took longer than
the matmuls.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.ops import ops_for
from skyrl_train.ops.base import Attention
from skyrl_train.ops.reference import weight_and_epsilon
from skyrl_train.policy.master_gradient import Embed, Head, MasterGradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}  # config.model_type


def has_known_blocks(config: Any) -> bool:
    """Return whether this model's blocks are those that `Ops.block` computes."""
    return config.model_type in FAMILIES and getattr(config, "hidden_act", "silu") == "silu"


def head_takes_out(module: PreTrainedModel) -> bool:
    """Return whether the output head takes `out`, where to write the logits."""
    return "forward" in vars(cast(Any, module.get_output_embeddings()))


def replace_blocks(module: PreTrainedModel) -> None:
    """Let a model of a known family compute through ops/ whenever it is handed one of our attention objects.

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
    """Return hidden_states [1, T, hidden] after the block."""
    if attention is None:
        return type(block).forward(block, hidden_states, *args, position_embeddings=position_embeddings, **family)
    row, (cosine, sine) = hidden_states[0], position_embeddings
    return ops_for(row.device, row.dtype).block(block, row, (cosine[0], sine[0]), attention)[None]


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    ops = ops_for(hidden_states.device, hidden_states.dtype)
    return ops.norm(hidden_states, *weight_and_epsilon(norm))


def _head_forward(head: nn.Linear, hidden: Tensor, out: Tensor | None = None) -> Tensor:
    if hidden.ndim != 2:
        return F.linear(hidden, head.weight, head.bias)
    return Head.apply(hidden, head.weight, head.bias, out)


def _embedding_forward(embedding: nn.Embedding, input_ids: Tensor) -> Tensor:
    gradient = MasterGradient.of(embedding.weight)
    if gradient is None or input_ids.device.type != "cpu" or not torch.is_grad_enabled():
        return nn.Embedding.forward(embedding, input_ids)
    return Embed.apply(input_ids, embedding.weight, embedding.padding_idx, gradient)
