"""The choice of the engine's forward pass: the fastest one that computes what the learner computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from loguru import logger
from torch import Tensor

from skyrl_train.engine.torch.cuda_graphs import CudaGraphs, GraphedPolicy
from skyrl_train.engine.torch.kv_cache import SHORT, Chunk, KVCache
from skyrl_train.engine.torch.paged_cache import PAGE_SIZE, Cache, PagedCache
from skyrl_train.ops import ops_for
from skyrl_train.ops.base import Decoder, Draw
from skyrl_train.ops.cuda import has_flash
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.blocks import has_known_blocks
from skyrl_train.policy.check import allowed_distance, distance
from skyrl_train.policy.lora import effective_weight
from skyrl_train.policy.model import Policy
from skyrl_train.policy.refusal import FOREIGN_ERRORS, ModelRefused, one_line


@torch.inference_mode()
def forward_pass(
    policy: Policy, *, cuda_graphs: bool = True, max_length: int | None = None
) -> tuple[Decoder, Draw | None]:
    """Return the fastest decoder that computes what the learner computes, and what draws its tokens, if it has that.

    Raises ModelRefused where none does, token by token over a cache. max_length: tokens of a sequence at most.
    """
    family, long = type(policy.module).__name__, min(SHORT + 2, max_length or policy.context)
    try:
        expected = packed_prompts_and_steps(policy, long)
        for model, draw in _candidates(policy):
            if distance(prompts_and_steps(model, policy, long), expected) <= allowed_distance(policy.compute_dtype):
                has_graphs = cuda_graphs and isinstance(model, GraphedPolicy)
                return GraphedPolicy(policy, CudaGraphs(policy.device)) if has_graphs else model, draw
    except FOREIGN_ERRORS as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelRefused(
            f"{family} is not supported: the engine cannot compute it over a cache ({reason})"
        ) from error
    raise ModelRefused(f"{family} is not supported: token by token over a cache it computes other numbers than at once")


def _candidates(policy: Policy) -> Iterator[tuple[Decoder, Draw | None]]:
    """Yield the fastest first. On a GPU without graphs, whose every replay is compared with the plain pass anyway."""
    if policy.device.type == "cuda":
        yield GraphedPolicy(policy, None), None
        return
    if has_known_blocks(policy.config):
        yield from ops_for(policy.device, policy.compute_dtype).decoders(policy.module, effective_weight)
    yield policy, None


@torch.inference_mode()
def computes_in_pages(policy: Policy, *, max_length: int | None = None) -> bool:
    """Return whether keys and values can lie in pages: on a GPU with a flash kernel that reads them rightly.

    Where it does not, this says why, and every sequence gets a place of its own.
    """
    if not has_flash(policy.device, policy.compute_dtype, policy.cache_shape[2]):
        return False
    long = min(PAGE_SIZE + 10, max_length or policy.context)
    cache = PagedCache(policy, max_slots=3, max_length=max(long, 17), max_bytes=2**30, evict=lambda: False)
    try:
        found = prompts_and_steps(GraphedPolicy(policy, None), policy, long, cache)
        far = distance(found, packed_prompts_and_steps(policy, long))
        why = f"its numbers are {far:.1e} away (relative)" if not far <= allowed_distance(policy.compute_dtype) else ""
    except RuntimeError as error:
        why = one_line(error)
    if why:
        logger.warning(
            f"sampling is slower than it could be: attention over a cache in pages does not work here: {why}"
        )
    return not why


def prompts_and_steps(model: Decoder, policy: Policy, long: int = SHORT + 2, cache: Cache | None = None) -> Tensor:
    """Return the logits of two short prompts, of a decoding step behind them, and of one beside a long prompt.

    [28 + long, vocab], of random tokens in the order of `_passes`. cache: an empty one with three slots.
    """
    cache = cache or KVCache(policy, max_slots=3, max_length=max(long, 17), max_bytes=2**30)
    cache.reserve(3, max(long, 17))
    ids, rows, done, starts = _random_ids(policy, long), [], 0, [0, 0, 0]
    for counts in _passes(long):
        chunks = [Chunk(sequence, starts[sequence], count) for sequence, count in counts]
        positions = torch.tensor([position for chunk in chunks for position in range(chunk.start, chunk.stop)])
        attention = cache.attention(chunks)
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
    """Return for each pass: (sequence, number of its next tokens)."""
    return [[(0, 15), (1, 9)], [(0, 1), (1, 1)], [(0, 1), (1, 1), (2, long)]]


def _random_ids(policy: Policy, long: int) -> Tensor:
    return torch.randint(policy.config.vocab_size, (28 + long,), generator=torch.Generator().manual_seed(1))
