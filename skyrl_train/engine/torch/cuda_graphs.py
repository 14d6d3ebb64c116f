"""The policy on a GPU, its decoding steps replayed from CUDA graphs.

A decoding step launches about a thousand small kernels, and starting them from Python takes longer than they do. So a
step is recorded once, over buffers that stay where they are, and replayed as a whole. Numbers of rows are rounded up to
few values, each with a graph of its own; so are attended lengths where there is no flash kernel, which reads them from
the GPU's memory. Rows that do not decode compute along and write where nobody reads. Prompts that are computed in the
same step go the plain way, behind it.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrl_train.engine.torch.draws import sent
from skyrl_train.engine.torch.kv_cache import CachedAttention
from skyrl_train.engine.torch.paged_cache import Cache, PagedAttention
from skyrl_train.policy.attention import Attention
from skyrl_train.policy.model import Policy

LEAST_ROWS, LEAST_SPAN = 8, 256  # steps between the rounded numbers
MAX_FAILURES = 2  # of recording one bucket: the first may be for want of memory

Compute = Callable[[], Tensor]
Record = Callable[[Compute], Compute]  # what computes -> what does the same again on what the buffers hold then


@dataclass(frozen=True, slots=True)
class Bucket:
    """So many rows, attending to their first `span` tokens at most; a cache in pages has span 0, for any length."""

    rows: int
    span: int

    @classmethod
    def around(cls, rows: int, span: int, cache: Cache) -> Bucket:
        least_rows = 1 << (rows - 1).bit_length() if rows < LEAST_ROWS else _rounded(rows, LEAST_ROWS)
        return cls(min(least_rows, cache.num_slots), min(_rounded(span, LEAST_SPAN), cache.longest_span))


def _rounded(number: int, step: int) -> int:
    """Round up to a multiple of `step` or of an eighth of the next power of two: few results, at most 1/4 too large."""
    step = max(step, (1 << (number - 1).bit_length()) // 8)
    return -(-number // step) * step


class DecodingStep:
    """One decoding step of a bucket over buffers that stay where they are: `fill` them, then `compute`."""

    def __init__(self, policy: Policy, cache: Cache, bucket: Bucket) -> None:
        self._policy, self._cache, self._bucket = policy, cache, bucket
        self._inputs = torch.zeros((2, bucket.rows), dtype=torch.int64, device=policy.device)  # ids, positions
        nothing = torch.zeros(0, dtype=torch.int64)
        self._places = cache.row_places(bucket.rows, nothing, nothing).to(policy.device)

    def fill(self, input_ids: Tensor, position_ids: Tensor, attention: CachedAttention | PagedAttention) -> None:
        """Positions [decoding rows] lie on the host, the ids there or on the device.

        A row that does not decode attends to one key, and the cache knows where its new one harms nobody.
        """
        rows, slots, device = attention.decoding_rows, attention.decoding_slots, self._policy.device
        # New memory each time: the copy of the step before may not have been made yet.
        host = torch.zeros(self._inputs.shape, dtype=torch.int64)
        host[1, rows] = position_ids
        if input_ids.device == rows.device:
            host[0, rows] = input_ids
        self._inputs.copy_(sent(host, device), non_blocking=True)
        if input_ids.device != rows.device:
            filled = slice(len(rows)) if _is_dense(rows) else sent(rows, input_ids.device)
            self._inputs[0, filled] = input_ids
        self._places.copy_(sent(self._cache.row_places(len(host[0]), slots, position_ids), device), non_blocking=True)

    def compute(self) -> Tensor:
        """Return the hidden states [rows, hidden]."""
        ids, positions = self._inputs
        attention = self._cache.recorded(positions, self._places, self._bucket.span)
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
        if self._record is None or not isinstance(attention, CachedAttention | PagedAttention):
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

    def _decoded(self, input_ids: Tensor, position_ids: Tensor, attention: CachedAttention | PagedAttention) -> Tensor:
        """One new token of some sequences. The result lies in a buffer that the next call writes over."""
        rows = attention.decoding_rows
        self._forget_if_moved(attention.cache)
        bucket = Bucket.around(int(rows[-1]) + 1, int(position_ids.max()) + 1, attention.cache)
        if bucket not in self._recorded:
            hidden = self._plainly(input_ids, position_ids, attention)
            if self._failures[bucket] == MAX_FAILURES:
                return hidden
            step = DecodingStep(self._policy, attention.cache, bucket)
            step.fill(input_ids, position_ids, attention)
            self._try(step, bucket, rows, hidden)
            return hidden
        step, replay = self._recorded[bucket]
        step.fill(input_ids, position_ids, attention)
        return _taken(replay(), rows)

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

    def _try(self, step: DecodingStep, bucket: Bucket, rows: Tensor, expected: Tensor) -> None:
        assert self._record is not None
        try:
            replay = self._record(step.compute)
            distance = _distance(_taken(replay(), rows), expected)
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

    def _forget_if_moved(self, cache: Cache) -> None:
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


def _taken(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return these rows, which ascend."""
    return hidden[: len(rows)] if _is_dense(rows) else hidden[sent(rows, hidden.device)]


def _is_dense(rows: Tensor) -> bool:
    """Return whether these rows, which ascend, are the first ones."""
    return int(rows[-1]) + 1 == len(rows)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative distance; NaN where ours has a NaN."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
