"""The transformer blocks of a policy as the decoder computes them, one by one or all in one call of C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skyrl_train.ops.cpu.c_structs import Cache, CLayer, RowTokens
from skyrl_train.ops.cpu.decode_kernels import NO_WINDOW, Kernels, Norm
from skyrl_train.ops.cpu.huge_pages import Room
from skyrl_train.ops.cpu.linears import Linear, TiledLinear, laid_out


@dataclass(frozen=True, slots=True)
class Layer:
    """One block as transformers built it: its norms, and its products laid out."""

    attention_norm: Norm
    query_key_value: Linear
    head_norms: tuple[Norm, Norm] | None  # of queries and keys
    scale: float
    window: int | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, block: Any, kernels: Kernels | None, room: Room) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        normed = hasattr(attention, "q_norm")
        return cls(
            attention_norm=Norm.of(block.input_layernorm),
            query_key_value=laid_out([attention.q_proj, attention.k_proj, attention.v_proj], kernels, room),
            head_norms=(Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if normed else None,
            scale=attention.scaling,
            window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
            output=laid_out([attention.o_proj], kernels, room),
            mlp_norm=Norm.of(block.post_attention_layernorm),
            gate_up=laid_out([mlp.gate_proj, mlp.up_proj], kernels, room, gated=True),
            down=laid_out([mlp.down_proj], kernels, room),
        )

    @property
    def products(self) -> tuple[Linear, ...]:
        return self.query_key_value, self.output, self.gate_up, self.down


class AllLayers:
    """Layers whose products are all tiled, for rows of one token each."""

    def __init__(self, layers: Sequence[Layer], kernels: Kernels) -> None:
        self._layers, self._kernels = layers, kernels  # the layers own what the structures point to
        self._structs = (CLayer * len(layers))(*map(_struct, layers))
        self._widest = max(struct.down.inputs for struct in self._structs)

    @classmethod
    def of(cls, layers: Sequence[Layer], kernels: Kernels | None) -> AllLayers | None:
        """None where a product is not tiled."""
        tiled = all(isinstance(product, TiledLinear) for layer in layers for product in layer.products)
        return cls(layers, kernels) if kernels is not None and tiled else None

    def __call__(
        self, row: Tensor, cosine: Tensor, sine: Tensor, cache: Cache, tokens: RowTokens, places: Tensor
    ) -> None:
        """row [T, hidden], in place; cosine, sine [T, D]."""
        self._kernels.decode(self._structs, cache, tokens, places, cosine, sine, row, self._widest)


def _struct(layer: Layer) -> CLayer:
    query_norm, key_norm = (norm.weight.data_ptr() for norm in layer.head_norms) if layer.head_norms else (None, None)
    norms = layer.attention_norm.weight.data_ptr(), query_norm, key_norm, layer.mlp_norm.weight.data_ptr()
    head_epsilon = layer.head_norms[0].epsilon if layer.head_norms else 0.0
    epsilons = layer.attention_norm.epsilon, head_epsilon, layer.mlp_norm.epsilon
    products = (product.product for product in layer.products if isinstance(product, TiledLinear))
    return CLayer(*norms, *products, *epsilons, layer.scale, NO_WINDOW if layer.window is None else layer.window)
