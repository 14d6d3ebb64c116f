"""The forward pass of a decoding step on a CPU: few operations, and weights in the layout that matmuls read fastest.

A decoding step multiplies a few rows by every weight, so it is bound by reading the weights. Here query, key and value
are one matmul, gate and up another; the weights are packed for AMX tiles or as oneDNN wants them; the residual is added
inside the matmul; what lies between the matmuls is done by c/decode.c where there is a C compiler. With tiles all
layers of a step are one call, unless a long prompt is computed beside it. The price is a second copy of the weights,
packed again after each update.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor, nn

from skyrl_train.ops.base import Attention, Draw, RowAttention
from skyrl_train.ops.cpu.decode_kernels import DecodeKernels, NoKernels, Norm, Shape
from skyrl_train.ops.cpu.huge_pages import Buffers
from skyrl_train.ops.cpu.layers import AllLayers, Layer
from skyrl_train.ops.cpu.linears import WeightOf, packed


def decoders(module: nn.Module, weight_of: WeightOf) -> Iterator[tuple[PackedDecoder, Draw | None]]:
    """Yield decoders of a transformers model of a known family: with kernels where they can be had, then without."""
    if not torch.backends.mkldnn.is_available():
        return
    if (kernels := _kernels_for(module)) is not None:
        yield PackedDecoder(module, kernels, weight_of), kernels.draw
    yield PackedDecoder(module, None, weight_of), None


def _kernels_for(module: Any) -> DecodeKernels | None:
    """Return None where they cannot be compiled, and say so: it costs nearly half of the speed."""
    attention = module.base_model.layers[0].self_attn
    heads, kv_heads = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
    try:
        return DecodeKernels(Shape(heads, kv_heads, attention.head_dim, module.dtype))
    except NoKernels as reason:
        logger.info(f"sampling without compiled kernels, which is slower: {reason}")
        return None


class PackedDecoder:
    """Implements `Decoder` over a packed copy of a model's weights."""

    def __init__(self, module: Any, kernels: DecodeKernels | None, weight_of: WeightOf) -> None:
        base = module.base_model
        head = module.get_output_embeddings()
        with torch.inference_mode():
            buffers = Buffers()
            self._layers = [Layer.of(block, kernels, buffers, weight_of) for block in base.layers]
            self._head = packed([head], kernels, buffers, weight_of)
        self._all_layers = AllLayers.of(self._layers, kernels)
        self._embedding, self._rotary, self._norm = base.embed_tokens.weight, base.rotary_emb, Norm.of(base.norm)
        self.kernels = kernels
        self._head_dim = int(base.layers[0].self_attn.head_dim)
        self._num_heads = base.layers[0].self_attn.q_proj.out_features // self._head_dim

    @torch.inference_mode()
    def weights_changed(self) -> None:
        for linear in (*(linear for layer in self._layers for linear in layer.linears), self._head):
            linear.pack()

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        row = F.embedding(input_ids, self._embedding)
        cosine, sine = (part[0] for part in self._rotary(row[None], position_ids[None]))
        if self._all_layers is not None and isinstance(attention, RowAttention) and attention.is_short:
            self._all_layers(row, cosine, sine, attention.store, attention.row_tokens, attention.places)
            return self._normed(row, self._norm)
        for index, layer in enumerate(self._layers):
            heads = layer.query_key_value(self._normed(row, layer.attention_norm)).unflatten(-1, (-1, self._head_dim))
            row = layer.output.added_to(row, self._attend(index, layer, heads, cosine, sine, attention).flatten(1))
            row = layer.down.added_to(row, layer.gate_up(self._normed(row, layer.mlp_norm)))
        return self._normed(row, self._norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _attend(
        self, index: int, layer: Layer, heads: Tensor, cosine: Tensor, sine: Tensor, attention: Attention
    ) -> Tensor:
        """Attend with the queries, keys and values of one layer: heads [T, heads + 2 kv_heads, D] -> [T, heads, D]."""
        if self.kernels is not None and isinstance(attention, RowAttention):
            rotate = partial(self.kernels.rotate_and_store, heads, cosine, sine, layer.head_norms)
            return attention.attend_rows(
                self.kernels.attend, index, heads, rotate, scale=layer.scale, window=layer.window
            )
        num_values = (heads.shape[1] - self._num_heads) // 2
        query, key, value = heads.split([self._num_heads, num_values, num_values], dim=1)
        if layer.head_norms:
            query, key = self._normed(query, layer.head_norms[0]), self._normed(key, layer.head_norms[1])
        query, key = (_rotated(part, cosine[:, None], sine[:, None]) for part in (query, key))
        return attention.attend(index, query, key, value, scale=layer.scale, window=layer.window)

    def _normed(self, row: Tensor, norm: Norm) -> Tensor:
        if self.kernels is not None:
            return self.kernels.rms_norm(row.contiguous(), norm)
        return F.rms_norm(row, norm.weight.shape, norm.weight, norm.epsilon)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = sine.chunk(2, dim=-1)
    signed_sine = torch.cat((-first, second), dim=-1)  # rotate_half, its sign taken out
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), signed_sine)
