"""The policy on a GPU, its decoding steps replayed from CUDA graphs.

A decoding step launches about a thousand small kernels, and starting them from Python takes longer than they do. So a
step is recorded once, over buffers that stay where they are, and replayed as a whole. Numbers of rows are rounded up to
few values, each with a graph of its own; so are attended lengths where there is no flash kernel, which reads them from
the GPU's memory. Row r is slot r of the cache; rows that do not decode compute along and write where nobody reads.
Prompts that are computed in the same step go the plain way, behind it.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrl_train.engine.torch.draws import sent
from skyrl_train.engine.torch.kv_cache import CachedAttention, KVCache
from skyrl_train.ops.cuda import decode_attention
from skyrl_train.policy.attention import Attention
from skyrl_train.policy.model import Policy

LEAST_ROWS, LEAST_SPAN = 8, 256  # steps between the rounded numbers
MAX_FAILURES = 2  # of recording one bucket: the first may be for want of memory

Compute = Callable[[], Tensor]
Record = Callable[[Compute], Compute]  # what computes -> what does the same again on what the buffers hold then


@dataclass(frozen=True, slots=True)
class Bucket:
    """The first `rows` slots, attending to their first `span` tokens at most: all of them with the flash kernel."""

    rows: int
    span: int

    @classmethod
    def around(cls, rows: int, span: int, cache: KVCache) -> Bucket:
        least_rows = 1 << (rows - 1).bit_length() if rows < LEAST_ROWS else _rounded(rows, LEAST_ROWS)
        least_span = cache.length if cache.has_flash else min(_rounded(span, LEAST_SPAN), cache.length)
        return cls(min(least_rows, cache.num_slots), least_span)


def _rounded(number: int, step: int) -> int:
    """Round up to a multiple of `step` or of an eighth of the next power of two: few results, at most 1/4 too large."""
    step = max(step, (1 << (number - 1).bit_length()) // 8)
    return -(-number // step) * step


class StaticAttention:
    """Computes what `CachedAttention` does for slots 0, 1, 2, ... with one new token each, without the host.


    positions, places: [rows], of the new token: what it attends as, and where its key and value go.
    """

    def __init__(self, cache: KVCache, positions: Tensor, places: Tensor, span: int) -> None:
        self._cache, self._positions, self._span = cache, positions, span
        self._rows = cache.rows_of(torch.arange(len(positions), device=positions.device), places)
        self._num_keys = positions + 1
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self._cache.write(layer, self._rows, key, value)
        if self._cache.has_flash:
            keys, values = self._cache.tokens(layer)
            length = self._cache.length
            return decode_attention(query, keys, values, self._num_keys, length, scale=scale, window=window)
        keys, values = (store[: len(query), :, : self._span] for store in self._cache.layer(layer))
        grouped = query.unflatten(1, (key.shape[1], -1))  # [rows, kv_heads, heads per key head, D]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask(window), scale=scale)
        return out.flatten(1, 2)

    def _mask(self, window: int | None) -> Tensor:
        """Return [rows, 1, 1, span]: 0 where the new token sees a key, else -inf."""
        if window not in self._masks:
            distance = self._positions[:, None] - torch.arange(self._span, device=self._positions.device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            nothing = torch.zeros(hidden.shape, dtype=self._cache.dtype, device=hidden.device)
            self._masks[window] = nothing.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._masks[window]


class DecodingStep:
    """One decoding step of a bucket over buffers that stay where they are: `fill` them, then `compute`."""

    def __init__(self, policy: Policy, cache: KVCache, bucket: Bucket) -> None:
        self._policy, self._cache, self._bucket = policy, cache, bucket
        self._inputs = torch.zeros((3, bucket.rows), dtype=torch.int64, device=policy.device)  # ids, positions, places

    def fill(self, input_ids: Tensor, position_ids: Tensor, slots: Tensor) -> None:
        """Positions and slots [decoding rows] lie on the host, the ids there or on the device.

        A slot that does not decode attends to its first key. Its new one goes to the end of the slot, where a sequence
        that still has a token to compute has nothing yet.
        """
        # New memory each time: the copy of the step before may not have been made yet.
        host = torch.zeros(self._inputs.shape, dtype=torch.int64, pin_memory=self._policy.device.type == "cuda")
        host[2] = self._cache.length - 1
        host[1:, slots] = position_ids
        if input_ids.device == slots.device:
            host[0, slots] = input_ids
        self._inputs.copy_(host, non_blocking=True)
        if input_ids.device != slots.device:
            places = slice(len(slots)) if _is_dense(slots) else sent(slots, input_ids.device)
            self._inputs[0, places] = input_ids

    def compute(self) -> Tensor:
        """Return the hidden states [rows, hidden]."""
        ids, positions, places = self._inputs
        attention = StaticAttention(self._cache, positions, places, self._bucket.span)
        return self._policy.hidden_states(ids, positions, attention)


class GraphedPolicy:
    """A `ForwardPass` that takes its ids and positions from the host. Without `record` every pass goes the plain way.

    Each bucket's first replay is compared with the plain pass, which it must be. Should recording fail, or a replay
    differ, this says why, tries that bucket once more, and then goes the plain way for it.
    """

    def __init__(self, policy: Policy, record: Record | None) -> None:
        self._policy, self._record = policy, record
        self._recorded: dict[Bucket, tuple[DecodingStep, Compute]] = {}
        self._failures: Counter[Bucket] = Counter()
        self._cache_at: tuple[int, ...] = ()  # where the cache and the weights lay when the steps were recorded
        self._weights_at = self._weights_now()

    @property
    def num_recorded(self) -> int:
        """Return how many buckets are replayed."""
        return len(self._recorded)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        if self._record is None or not isinstance(attention, CachedAttention):
            return self._plainly(input_ids, position_ids, attention)
        num_decoding = len(attention.decoding_slots)
        if num_decoding == len(input_ids):
            return self._decoded(input_ids, position_ids, attention)
        if num_decoding == 0:
            return self._plainly(input_ids, position_ids, attention)
        (ids, prompt_ids), (positions, prompt_positions) = (
            tensor.split([num_decoding, len(input_ids) - num_decoding]) for tensor in (input_ids, position_ids)
        )
        decoded = self._decoded(ids, positions, attention.decoding_alone)
        return torch.cat([decoded, self._plainly(prompt_ids, prompt_positions, attention.without_decoding)])

    def _decoded(self, input_ids: Tensor, position_ids: Tensor, attention: CachedAttention) -> Tensor:
        """One new token of some sequences. The result lies in a buffer that the next call writes over."""
        slots = attention.decoding_slots
        self._forget_if_moved(attention.cache)
        rows = int(slots[-1]) + 1
        bucket = Bucket.around(rows, int(position_ids.max()) + 1, attention.cache)
        if bucket not in self._recorded:
            hidden = self._plainly(input_ids, position_ids, attention)
            if self._failures[bucket] == MAX_FAILURES:
                return hidden
            step = DecodingStep(self._policy, attention.cache, bucket)
            step.fill(input_ids, position_ids, slots)
            self._try(step, bucket, slots, hidden)
            return hidden
        step, replay = self._recorded[bucket]
        step.fill(input_ids, position_ids, slots)
        return _of_slots(replay(), slots)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._policy.logits(hidden)

    def weights_changed(self) -> None:
        """Graphs read the weights where they lie, so a change in place needs nothing."""
        if self._weights_at != (now := self._weights_now()):
            self._recorded.clear()
            self._weights_at = now

    def _plainly(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        device = self._policy.device
        return self._policy.hidden_states(input_ids.to(device), position_ids.to(device), attention)

    def _try(self, step: DecodingStep, bucket: Bucket, slots: Tensor, expected: Tensor) -> None:
        assert self._record is not None
        try:
            replay = self._record(step.compute)
            distance = _distance(_of_slots(replay(), slots), expected)
        except RuntimeError as error:
            self._count_failure(bucket, f"recording a step of {bucket.rows} rows failed: {error}")
            return
        allowed = 1e-3 if expected.dtype == torch.float32 else 0.1
        if distance <= allowed:
            self._recorded[bucket] = step, replay
        else:
            self._count_failure(
                bucket, f"a replayed step of {bucket.rows} rows is {distance:.1e} away from the plain one (relative)"
            )

    def _count_failure(self, bucket: Bucket, why: str) -> None:
        self._failures[bucket] += 1
        if self._failures[bucket] == MAX_FAILURES:
            logger.warning(f"steps of {bucket.rows} rows are sampled without a CUDA graph, which is slower: {why}")

    def _forget_if_moved(self, cache: KVCache) -> None:
        keys, _ = cache.layer(0)
        if self._cache_at != (now := (keys.data_ptr(), *keys.shape)):
            self._recorded.clear()
            self._cache_at = now

    def _weights_now(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self._policy.module.parameters())


class CudaGraphs:
    """Records on a GPU. The graphs share their memory for what lies between; only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, compute: Compute) -> Compute:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(current):  # also after a failure
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream), NothingFromTheHost():
                compute()  # loads what libraries load at their first call, which no recording may
            current.wait_stream(self._stream)
            try:
                with (
                    _no_garbage_collection(),
                    torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
                ):
                    hidden = compute()
            except RuntimeError:
                with suppress(RuntimeError):  # torch leaves its allocator recording if the end fails as well
                    torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
                raise

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Freeing an older graph or an event in mid-recording would end the recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class NothingFromTheHost(TorchDispatchMode):
    """RuntimeError at an operation that needs the host in mid-pass: a number for a branch, a size, a copy.

    Recording would fail there, and torch recovers from that only in part. So the pass is tried under this first.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        masked = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
        sized = torch.Tag.dynamic_output_shape in func.tags and (masked or "index" not in str(func))
        if torch.Tag.data_dependent_output in func.tags or sized:
            raise RuntimeError(f"the model asks the host in {func}")
        out = func(*args, **(kwargs or {}))
        used = [*given, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))]
        on_host = [tensor for tensor in used if tensor.device.type == "cpu"]
        copied = any(tensor.dim() for tensor in on_host) or "copy" in str(func)  # else one number, as an argument
        if on_host and len(on_host) < len(used) and copied:
            raise RuntimeError(f"the model asks the host in {func}")
        return out


def _of_slots(hidden: Tensor, slots: Tensor) -> Tensor:
    """The rows of these slots, which ascend."""
    return hidden[: len(slots)] if _is_dense(slots) else hidden[sent(slots, hidden.device)]


def _is_dense(slots: Tensor) -> bool:
    """Return whether these slots, which ascend, are the first ones."""
    return int(slots[-1]) + 1 == len(slots)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative distance; NaN where ours has a NaN."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
