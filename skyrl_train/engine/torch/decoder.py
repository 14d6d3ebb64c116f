"""The forward pass of the common model families for a processor: few operations, weights laid out for its products.

A decoding step multiplies a few rows by every weight, so it is bound by reading the weights. Here query, key and value
are one product, gate and up another; the weights are kept in the blocked layout that oneDNN reads fastest; the
residual is added inside the product. The price is a second copy of the weights, laid out anew after each update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.learner.attention import Attention, PackedAttention
from skyrl_train.learner.lora import effective_weight
from skyrl_train.learner.model import Policy

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}  # config.model_type
PACKED_FOR_ROWS = 32  # the number of rows the layout is chosen for; others work as well


class ForwardPass(Protocol):
    """What the engine computes with."""

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        """input_ids, position_ids: [T] -> [T, hidden], after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[*, hidden] -> [*, vocab]"""
        ...


def forward_pass(policy: Policy) -> ForwardPass:
    """The fastest one that computes what the policy computes: a `Decoder`, or the policy itself."""
    config: Any = policy.config
    packs = policy.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not packs or config.model_type not in FAMILIES or getattr(config, "hidden_act", "silu") != "silu":
        return policy
    decoder = Decoder(policy)
    return decoder if _agrees(decoder, policy) else policy


class PackedLinear:
    """x @ cat(weights).T + cat(biases), for weights that share their input."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears = linears
        self._weight = self._bias = torch.empty(0)
        self.pack()

    def pack(self) -> None:
        """Read the weights again."""
        weight = torch.cat([effective_weight(linear) for linear in self._linears])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        biases = [linear.bias.detach() for linear in self._linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, self._weight, self._bias, "add")


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block, as transformers built it, with its products packed."""

    block: Any
    query_key_value: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear

    @classmethod
    def of(cls, block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        return cls(
            block,
            PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
            PackedLinear([attention.o_proj]),
            PackedLinear([mlp.gate_proj, mlp.up_proj]),
            PackedLinear([mlp.down_proj]),
        )

    @property
    def products(self) -> tuple[PackedLinear, ...]:
        return self.query_key_value, self.output, self.gate_up, self.down


class Decoder:
    """A `ForwardPass` over a policy's weights. Call `weights_changed` when they have."""

    def __init__(self, policy: Policy) -> None:
        base: Any = policy.module.base_model
        head: Any = policy.module.get_output_embeddings()
        with torch.inference_mode():
            self._layers = [Layer.of(block) for block in base.layers]
            self._head = PackedLinear([head])
        self._base = base
        self._head_dim = int(base.layers[0].self_attn.head_dim)
        self._num_heads = base.layers[0].self_attn.q_proj.out_features // self._head_dim

    @torch.inference_mode()
    def weights_changed(self) -> None:
        """Lay the weights out anew."""
        for product in (*(product for layer in self._layers for product in layer.products), self._head):
            product.pack()

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        row = F.embedding(input_ids, self._base.embed_tokens.weight)
        cos, sin = (part[0, :, None] for part in self._base.rotary_emb(row[None], position_ids[None]))
        first, second = sin.chunk(2, dim=-1)
        signed_sin = torch.cat((-first, second), dim=-1)  # rotate_half, its sign taken out
        for index, layer in enumerate(self._layers):
            row = self._attend(index, layer, row, cos, signed_sin, attention)
            gate, up = layer.gate_up(_normed(row, layer.block.post_attention_layernorm)).chunk(2, dim=-1)
            row = layer.down.added_to(row, F.silu(gate).mul_(up))
        return _normed(row, self._base.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _attend(
        self, index: int, layer: Layer, row: Tensor, cos: Tensor, signed_sin: Tensor, attention: Attention
    ) -> Tensor:
        module = layer.block.self_attn
        heads = layer.query_key_value(_normed(row, layer.block.input_layernorm)).unflatten(-1, (-1, self._head_dim))
        num_values = (heads.shape[1] - self._num_heads) // 2
        turned, value = heads.split([heads.shape[1] - num_values, num_values], dim=1)
        if hasattr(module, "q_norm"):
            query, key = turned.split([self._num_heads, num_values], dim=1)
            turned = torch.cat((_normed(query, module.q_norm), _normed(key, module.k_norm)), dim=1)
        turned = torch.addcmul(turned * cos, turned.roll(self._head_dim // 2, -1), signed_sin)
        query, key = turned.split([self._num_heads, num_values], dim=1)
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        out = attention.attend(index, query, key, value, scale=module.scaling, window=window)
        return layer.output.added_to(row, out.flatten(1))


def _normed(row: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(row, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.inference_mode()
def _agrees(decoder: Decoder, policy: Policy) -> bool:
    """Whether both compute the same on random tokens, as far as the type's rounding allows."""
    ids = torch.randint(policy.config.vocab_size, (16,), generator=torch.Generator().manual_seed(1))
    positions, offsets = torch.arange(16), torch.tensor([0, 16])
    ours, theirs = (
        model.logits(model.hidden_states(ids, positions, PackedAttention(offsets))).float()
        for model in (decoder, policy)
    )
    allowed = 1e-3 if policy.compute_dtype == torch.float32 else 0.1
    return bool((ours - theirs).norm() <= allowed * theirs.norm())
