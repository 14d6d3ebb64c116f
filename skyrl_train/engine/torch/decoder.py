"""The forward pass of the common model families for a processor: few operations, weights laid out for its products.

A decoding step multiplies a few rows by every weight, so it is bound by reading the weights. Here query, key and value
are one product, gate and up another; the weights lie as they are read, in AMX tiles or as oneDNN likes them; the
residual is added inside the product; what lies between the products is done by `kernels` where there is a C compiler.
With tiles all layers of a step are one call, unless a long prompt is computed beside it. The price is a second copy of
the weights, laid out anew after each update.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor

from skyrl_train.engine.torch.cuda_graphs import CudaGraphs, GraphedPolicy
from skyrl_train.engine.torch.kv_cache import SHORT, CachedAttention, Chunk, KVCache
from skyrl_train.ops.cpu.decode_kernels import Kernels, NoKernels, Norm, Shape
from skyrl_train.ops.cpu.huge_pages import Room
from skyrl_train.ops.cpu.layers import AllLayers, Layer
from skyrl_train.ops.cpu.linears import laid_out
from skyrl_train.policy.attention import Attention, PackedAttention
from skyrl_train.policy.blocks import has_known_blocks
from skyrl_train.policy.check import allowed_distance, distance
from skyrl_train.policy.model import Policy
from skyrl_train.policy.refusal import FOREIGN_ERRORS, ModelRefused, one_line


class ForwardPass(Protocol):
    """What the engine computes with."""

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        """input_ids, position_ids: [T] -> [T, hidden], after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[*, hidden] -> [*, vocab]"""
        ...


@torch.inference_mode()
def forward_pass(policy: Policy, *, cuda_graphs: bool = True, max_length: int | None = None) -> ForwardPass:
    """Return the fastest one that computes what the learner computes: a `Decoder`, or the policy itself.

    Raises ModelRefused where none does, token by token over a cache. max_length: tokens of a sequence at most.
    """
    family, long = type(policy.module).__name__, min(SHORT + 2, max_length or policy.context)
    try:
        expected = packed_prompts_and_steps(policy, long)
        for model in _candidates(policy):
            if distance(prompts_and_steps(model, policy, long), expected) <= allowed_distance(policy.compute_dtype):
                has_graphs = cuda_graphs and isinstance(model, GraphedPolicy)
                return GraphedPolicy(policy, CudaGraphs(policy.device)) if has_graphs else model
    except FOREIGN_ERRORS as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelRefused(
            f"{family} is not supported: the engine cannot compute it over a cache ({reason})"
        ) from error
    raise ModelRefused(f"{family} is not supported: token by token over a cache it computes other numbers than at once")


def _candidates(policy: Policy) -> Iterator[ForwardPass]:
    """Yield the fastest first. On a GPU without graphs, whose every replay is compared with the plain pass anyway."""
    if policy.device.type == "cuda":
        yield GraphedPolicy(policy, None)
        return
    packs = policy.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if packs and has_known_blocks(policy.config):
        if (kernels := kernels_for(policy)) is not None:
            yield Decoder(policy, kernels)
        yield Decoder(policy, None)
    yield policy


def kernels_for(policy: Policy) -> Kernels | None:
    """None where they cannot be compiled; says so, for it costs nearly half of the speed."""
    attention: Any = policy.module.base_model.layers[0].self_attn  # ty: ignore
    heads, kv_heads = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
    try:
        return Kernels(Shape(heads, kv_heads, attention.head_dim, policy.compute_dtype))
    except NoKernels as reason:
        logger.info(f"sampling without compiled kernels, which is slower: {reason}")
        return None


class Decoder:
    """A `ForwardPass` over a policy's weights. Call `weights_changed` when they have."""

    def __init__(self, policy: Policy, kernels: Kernels | None) -> None:
        base: Any = policy.module.base_model
        head: Any = policy.module.get_output_embeddings()
        with torch.inference_mode():
            room = Room()
            self._layers = [Layer.of(block, kernels, room) for block in base.layers]
            self._head = laid_out([head], kernels, room)
        self._all_layers = AllLayers.of(self._layers, kernels)
        self._embedding, self._rotary, self._norm = base.embed_tokens.weight, base.rotary_emb, Norm.of(base.norm)
        self.kernels = kernels
        self._head_dim = int(base.layers[0].self_attn.head_dim)
        self._num_heads = base.layers[0].self_attn.q_proj.out_features // self._head_dim

    @torch.inference_mode()
    def weights_changed(self) -> None:
        """Lay the weights out anew."""
        for product in (*(product for layer in self._layers for product in layer.products), self._head):
            product.pack()

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        row = F.embedding(input_ids, self._embedding)
        cosine, sine = (part[0] for part in self._rotary(row[None], position_ids[None]))
        if self._all_layers is not None and isinstance(attention, CachedAttention) and attention.is_short:
            self._all_layers(row, cosine, sine, attention.cache.struct, attention.row_tokens, attention.places)
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
        """heads [T, heads + 2 kv_heads, D] -> [T, heads, D]"""
        if self.kernels is not None and isinstance(attention, CachedAttention):
            rotate = partial(self.kernels.rotate_and_store, heads, cosine, sine, layer.head_norms)
            return attention.attend_with(self.kernels, index, heads, rotate, scale=layer.scale, window=layer.window)
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


def prompts_and_steps(model: ForwardPass, policy: Policy, long: int = SHORT + 2) -> Tensor:
    """Return the logits of two short prompts, of a decoding step behind them, and of one beside a long prompt.

    [28 + long, vocab], of random tokens in the order of `_passes`.
    """
    cache = KVCache(policy, max_slots=3, max_length=max(long, 17), max_bytes=2**30)
    cache.reserve(3, max(long, 17))
    ids, rows, done, starts = _random_ids(policy, long), [], 0, [0, 0, 0]
    for counts in _passes(long):
        chunks = [Chunk(sequence, starts[sequence], count) for sequence, count in counts]
        positions = torch.tensor([position for chunk in chunks for position in range(chunk.start, chunk.stop)])
        attention = CachedAttention(cache, chunks, policy.device)
        rows.append(model.hidden_states(ids[done : done + len(positions)], positions, attention))
        done += len(positions)
        for chunk in chunks:
            starts[chunk.slot] = chunk.stop
    return model.logits(torch.cat(rows))


def packed_prompts_and_steps(policy: Policy, long: int = SHORT + 2) -> Tensor:
    """Return the same logits as the learner computes them: each sequence at once, all of them in one pass."""
    sequence = torch.cat([torch.full((count,), s) for counts in _passes(long) for s, count in counts])
    order = sequence.argsort(stable=True)  # of the tokens, laid end to end
    lengths = sequence.bincount()
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inputs = (tensor.to(policy.device) for tensor in (_random_ids(policy, long)[order], positions))
    hidden = policy.hidden_states(*inputs, PackedAttention(offsets.to(policy.device)))
    return policy.logits(hidden[order.argsort().to(policy.device)])


def _passes(long: int) -> list[list[tuple[int, int]]]:
    """Pass by pass: (sequence, number of its next tokens)."""
    return [[(0, 15), (1, 9)], [(0, 1), (1, 1)], [(0, 1), (1, 1), (2, long)]]


def _random_ids(policy: Policy, long: int) -> Tensor:
    return torch.randint(policy.config.vocab_size, (28 + long,), generator=torch.Generator().manual_seed(1))
