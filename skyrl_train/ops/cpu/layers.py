"""The transformer blocks of a policy as the decoder computes them, one by one or all in one call of C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skyrl_train.ops.base import RowTokens
from skyrl_train.ops.cpu.c_structs import CLayer, cache_struct
from skyrl_train.ops.cpu.decode_kernels import NO_WINDOW, DecodeKernels, Norm
from skyrl_train.ops.cpu.huge_pages import Buffers
from skyrl_train.ops.cpu.linears import PackedWeight, TiledLinear, WeightOf, packed


@dataclass(frozen=True, slots=True)
class Layer:
    """One block as transformers built it: its norms, and its linear layers packed."""

    attention_norm: Norm
    query_key_value: PackedWeight
    head_norms: tuple[Norm, Norm] | None  # of queries and keys
    scale: float
    window: int | None
    output: PackedWeight
    mlp_norm: Norm
    gate_up: PackedWeight
    down: PackedWeight

    @classmethod
    def of(cls, block: Any, kernels: DecodeKernels | None, buffers: Buffers, weight_of: WeightOf) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        normed = hasattr(attention, "q_norm")
        return cls(
            attention_norm=Norm.of(block.input_layernorm),
            query_key_value=packed([attention.q_proj, attention.k_proj, attention.v_proj], kernels, buffers, weight_of),
            head_norms=(Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if normed else None,
            scale=attention.scaling,
            window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
            output=packed([attention.o_proj], kernels, buffers, weight_of),
            mlp_norm=Norm.of(block.post_attention_layernorm),
            gate_up=packed([mlp.gate_proj, mlp.up_proj], kernels, buffers, weight_of, gated=True),
            down=packed([mlp.down_proj], kernels, buffers, weight_of),
        )

    @property
    def linears(self) -> tuple[PackedWeight, ...]:
        return self.query_key_value, self.output, self.gate_up, self.down


class AllLayers:
    """All layers in one call, for rows of one token each, where every linear layer is tiled."""

    def __init__(self, layers: Sequence[Layer], kernels: DecodeKernels) -> None:
        self._layers, self._kernels = layers, kernels  # the layers own what the structures point to
        self._structs = (CLayer * len(layers))(*map(_struct, layers))
        self._widest = max(struct.down.inputs for struct in self._structs)

    @classmethod
    def of(cls, layers: Sequence[Layer], kernels: DecodeKernels | None) -> AllLayers | None:
        """Return None where a linear layer is not tiled."""
        tiled = all(isinstance(linear, TiledLinear) for layer in layers for linear in layer.linears)
        return cls(layers, kernels) if kernels is not None and tiled else None

    def __call__(
        self, row: Tensor, cosine: Tensor, sine: Tensor, store: Tensor, tokens: RowTokens, places: Tensor
    ) -> None:
        """Compute row [T, hidden] in place; cosine, sine [T, D]; store: see `RowAttention`."""
        self._kernels.decode(self._structs, cache_struct(store), tokens, places, cosine, sine, row, self._widest)


def _struct(layer: Layer) -> CLayer:
    query_norm, key_norm = (norm.weight.data_ptr() for norm in layer.head_norms) if layer.head_norms else (None, None)
    norms = layer.attention_norm.weight.data_ptr(), query_norm, key_norm, layer.mlp_norm.weight.data_ptr()
    head_epsilon = layer.head_norms[0].epsilon if layer.head_norms else 0.0
    epsilons = layer.attention_norm.epsilon, head_epsilon, layer.mlp_norm.epsilon
    linears = (linear.struct for linear in layer.linears if isinstance(linear, TiledLinear))
    return CLayer(*norms, *linears, *epsilons, layer.scale, NO_WINDOW if layer.window is None else layer.window)
