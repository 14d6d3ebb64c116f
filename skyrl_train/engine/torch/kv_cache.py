"""Keys and values of the sequences in flight, and the attention that reads and extends them.

Every sequence owns a slot. A layer's keys are one tensor [slots, kv_heads, length, D], so one decode step of many
sequences attends over a view of it: nothing is gathered, repeated or allocated. Where a GPU has a flash kernel,
`paged_cache.py` takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from skyrl_train.engine.torch.pages import KeptPages
from skyrl_train.ops import ops_for
from skyrl_train.ops.base import RowAttention, RowTokens
from skyrl_train.policy.model import Policy

LENGTH_STEP = 128  # tokens
SHORT = 128  # tokens; the kernels attend to a chunk token by token up to here, to a longer one through torch


@dataclass(frozen=True, slots=True)
class KeptCopy:
    """Keys and values of a session's last turn, [layers, 2, kv_heads, tokens, D]."""

    tensor: Tensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


Saved = KeptCopy | KeptPages


class KVCache:
    """The cache of all sequences: allocated as needed, at least doubled each time unless that exceeds `max_bytes`."""

    def __init__(self, policy: Policy, *, max_slots: int, max_length: int, max_bytes: int) -> None:
        layers, heads, head_dim = policy.cache_shape
        self._max_slots, self._max_length = max_slots, max_length
        shape = (layers, 2, 0, heads, 0, head_dim)
        self._store = torch.zeros(shape, dtype=policy.compute_dtype, device=policy.device)
        self.max_tokens = max_bytes // self.bytes_per_token  # slots times length

    @property
    def length(self) -> int:
        return self._store.shape[4]

    @property
    def dtype(self) -> torch.dtype:
        return self._store.dtype

    @property
    def bytes_per_token(self) -> int:
        layers, two, _, heads, _, dim = self._store.shape
        return layers * two * heads * dim * self._store.element_size()

    def max_kept(self, session_bytes: int) -> int:
        """Return the most tokens of one session that fit into so many bytes."""
        return session_bytes // self.bytes_per_token

    def num_that_fit(self, in_flight: Iterable[int], waiting: Iterable[int]) -> int:
        """Return how many sequences of these lengths fit beside those in flight: each gets as much as the longest."""
        lengths = list(in_flight)
        longest, count = max(lengths, default=0), len(lengths)
        for length in waiting:
            longest = max(longest, length)
            if count and (count + 1) * longest > self.max_tokens:
                break
            count += 1
        return count - len(lengths)

    def reserve(self, slots: int, length: int) -> None:
        """Allocate this many slots of this length. No slot or token beyond them survives a new allocation."""
        layers, two, old_slots, heads, old_length, dim = self._store.shape
        if slots <= old_slots and length <= old_length:
            return
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        ample_slots = old_slots if slots <= old_slots else min(max(slots, 2 * old_slots), self._max_slots)
        ample_length = old_length if length <= old_length else min(max(length, 2 * old_length), self._max_length)
        if ample_slots * ample_length <= self.max_tokens:
            slots, length = ample_slots, max(length, ample_length)
        grown = self._zeros((layers, two, slots, heads, length, dim))
        old = self._store[:, :, :slots, :, :length]
        grown[:, :, : old.shape[2], :, : old.shape[4]] = old
        self._store = grown

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return a new store. Not an empty one: a masked position still multiplies its value by 0."""
        if self._store.device.type != "cpu":
            return self._store.new_zeros(shape)
        return ops_for(self._store.device, self._store.dtype).zeros(shape, self._store.dtype)

    def share(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        self._store[:, :, target, :, :length] = self._store[:, :, source, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Let slot `target` have what slot `source` had, which is free then."""
        self.share(source, target, length)

    def free(self, slot: int) -> None:
        """Do nothing: whoever gets the slot next writes over it."""

    def save(self, slot: int, length: int) -> KeptCopy:
        """Return a copy of the first `length` tokens of a slot."""
        return KeptCopy(self._store[:, :, slot, :, :length].clone())

    def load(self, slot: int, saved: Saved, length: int) -> None:
        assert isinstance(saved, KeptCopy)
        self._store[:, :, slot, :, :length] = saved.tensor[:, :, :, :length]

    def drop(self, saved: Saved) -> None:
        """Do nothing: the copy goes with its last reference."""

    def attention(self, chunks: list[Chunk]) -> CachedAttention:
        """Return the attention of a pass that computes these chunks."""
        return CachedAttention(self, chunks, self._store.device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each [slots, kv_heads, length, D]."""
        return self._store[index, 0], self._store[index, 1]

    @property
    def num_slots(self) -> int:
        return self._store.shape[2]

    def rows_of(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Return the rows for `write` of tokens with these slots and positions, [T] each."""
        heads = self._store.shape[3]
        first = slots[:, None] * heads + torch.arange(heads, device=slots.device)
        return (first * self.length + positions[:, None]).flatten()

    def write(self, index: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Put key and value [T, kv_heads, D] of new tokens into one layer."""
        for store, new in zip(self.layer(index), (key, value), strict=True):
            store.view(-1, store.shape[-1]).index_copy_(0, rows, new.reshape(-1, store.shape[-1]))

    def row_places(self, rows: int, slots: Tensor, positions: Tensor) -> Tensor:
        """Return what `StaticSlots` reads, [rows]: the place of the new token in each slot.

        In a slot that does not decode it is the last one, where a sequence that is not finished has nothing yet.
        """
        places = torch.full((rows,), self.length - 1)
        places[slots] = positions
        return places

    def recorded(self, positions: Tensor, places: Tensor, span: int) -> StaticSlots:
        """Return the attention of a recorded step."""
        return StaticSlots(self, positions, places, span)

    @property
    def longest_span(self) -> int:
        """Return how many tokens a recorded step can attend to."""
        return self.length

    @property
    def store(self) -> Tensor:
        """Return all of it: [layers, keys and values, slots, kv_heads, length, D]."""
        return self._store


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of the sequence in this slot: what one forward pass computes of it."""

    slot: int
    start: int
    count: int
    prefix_slot: int = 0  # a slot that holds the same first `prefix_length` tokens, read once for all that name it
    prefix_length: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.count


class CachedAttention(RowAttention):
    """Attention of one forward pass: chunks end to end in the row, first those of one token by ascending slot.

    Chunks of one token (decoding) attend all at once; a longer chunk (prefill) attends alone. The kernels take all
    tokens of the first chunks at once, as long as those are short.
    """

    def __init__(self, cache: KVCache, chunks: list[Chunk], device: torch.device) -> None:
        self.cache, self._chunks, self._device = cache, chunks, device
        self._singles = [chunk for chunk in chunks if chunk.count == 1]
        self._long = chunks[len(self._singles) :]
        if any(chunk.count == 1 for chunk in self._long):
            raise ValueError("chunks of one token must come first")
        self._slots = torch.tensor([chunk.slot for chunk in chunks for _ in range(chunk.count)])
        self._positions = torch.tensor([position for chunk in chunks for position in range(chunk.start, chunk.stop)])
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        if self._singles:
            self._first, self._last = self._singles[0].slot, self._singles[-1].slot + 1
            self._span = max(chunk.stop for chunk in self._singles)
            self._dense = self._last - self._first == len(self._singles)

    @cached_property
    def _offsets(self) -> Tensor:
        return torch.tensor([chunk.slot - self._first for chunk in self._singles], device=self._device)

    @property
    def decoding_slots(self) -> Tensor:
        """Return the slots of the chunks of one token, which come first: [N] on the host, ascending."""
        return self._slots[: len(self._singles)]

    @property
    def decoding_rows(self) -> Tensor:
        """Return the row of a recorded step in which each of them stands: the number of its slot."""
        return self.decoding_slots

    @cached_property
    def decoding_alone(self) -> CachedAttention:
        """Return the attention of the chunks of one token."""
        return CachedAttention(self.cache, self._singles, self._device)

    @cached_property
    def without_decoding(self) -> CachedAttention:
        """Return the attention of the longer chunks."""
        return CachedAttention(self.cache, self._long, self._device)

    @property
    def store(self) -> Tensor:
        return self.cache.store

    @cached_property
    def is_short(self) -> bool:
        """Return whether every row is one of `row_tokens`."""
        return len(self._short) == len(self._chunks)

    @cached_property
    def _short(self) -> list[Chunk]:
        """Return the first chunks, as long as they are short."""
        return list(takewhile(lambda chunk: chunk.count <= SHORT, self._chunks))

    @cached_property
    def row_tokens(self) -> RowTokens:
        """Return the tokens of the short chunks."""
        num_rows = sum(chunk.count for chunk in self._short)
        prefixes = [(chunk.prefix_slot, chunk.prefix_length) for chunk in self._short for _ in range(chunk.count)]
        prefix_slots, lengths = torch.tensor(prefixes, dtype=torch.int64).view(-1, 2).t().contiguous()
        return RowTokens(self._slots[:num_rows], self._positions[:num_rows], prefix_slots, lengths)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self.cache.write(layer, self._rows, key, value)
        cached = self.cache.layer(layer)
        grouped = query.unflatten(1, (key.shape[1], -1))  # [T, kv_heads, heads per key head, D]
        parts = []
        if self._singles:
            parts.append(self._attend_singles(grouped[: len(self._singles)], *cached, scale, window).flatten(1, 2))
        start = len(self._singles)
        return _joined(parts + self._attend_chunks(self._long, start, grouped, key, value, cached, scale, window))

    def attend_rows(
        self,
        attend: Callable[..., Tensor],
        layer: int,
        heads: Tensor,
        rotate: Callable[[Tensor, Tensor, Tensor], None],
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        keys, values = self.cache.layer(layer)
        rotate(keys, values, self.places)
        num_values, parts = keys.shape[1], []
        if num_rows := len(self.row_tokens):
            parts.append(attend(heads, keys, values, self.row_tokens, scale=scale, window=window))
        if not self.is_short:
            query, key, value = heads.split([heads.shape[1] - 2 * num_values, num_values, num_values], dim=1)
            grouped = query.unflatten(1, (num_values, -1))
            longs = self._chunks[len(self._short) :]
            parts += self._attend_chunks(longs, num_rows, grouped, key, value, (keys, values), scale, window)
        return _joined(parts)

    @cached_property
    def _rows(self) -> Tensor:
        return self.cache.rows_of(self._slots, self._positions).to(self._device)

    @cached_property
    def places(self) -> Tensor:
        """Return where each new key of the first head begins, counted in numbers."""
        keys = self.cache.layer(0)[0]
        return self._slots * keys.stride(0) + self._positions * keys.stride(2)

    def _attend_chunks(
        self,
        chunks: list[Chunk],
        start: int,
        grouped: Tensor,
        key: Tensor,
        value: Tensor,
        cached: tuple[Tensor, Tensor],
        scale: float,
        window: int | None,
    ) -> list[Tensor]:
        """Attend with each chunk alone; the first one's first row is `start`."""
        parts = []
        for chunk in chunks:
            own = (tensor[start : start + chunk.count] for tensor in (grouped, key, value))
            parts.append(self._attend_chunk(chunk, *own, cached, scale, window).flatten(1, 2))
            start += chunk.count
        return parts

    def _attend_singles(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """Attend with one new token of N sequences: query [N, kv_heads, R, D]. Idle slots in between compute along."""
        keys, values = (store[self._first : self._last, :, : self._span] for store in (keys, values))
        if not self._dense:
            shape = (self._last - self._first, *query.shape[1:])
            query = query.new_zeros(shape).index_copy_(0, self._offsets, query)
        mask = self._mask(-1, window)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        return out if self._dense else out.index_select(0, self._offsets)

    def _attend_chunk(
        self,
        chunk: Chunk,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cached: tuple[Tensor, Tensor],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend with N new tokens of one sequence, query [N, kv_heads, R, D], after the `chunk.start` cached ones."""
        windowed = window is not None and window < chunk.stop
        if chunk.start:
            key, value = (store[chunk.slot, :, : chunk.stop] for store in cached)
        else:
            key, value = key.transpose(0, 1), value.transpose(0, 1)
        shared = (tensor.unsqueeze(1).expand(-1, query.shape[2], -1, -1) for tensor in (key, value))
        mask = self._mask(chunk.slot, window) if chunk.start or windowed else None
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), *shared, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return out.permute(2, 0, 1, 3)

    def _mask(self, slot: int, window: int | None) -> Tensor:
        """Return 0 where a query sees a key, else -inf, the same in every layer; slot -1: that of all single tokens."""
        if (mask := self._masks.get((slot, window))) is None:
            mask = self._single_mask(window) if slot < 0 else self._chunk_mask(slot, window)
            self._masks[slot, window] = mask
        return mask

    def _single_mask(self, window: int | None) -> Tensor:
        """Return the mask [slots, 1, 1, span]. An idle slot sees its first token, so that nothing is undefined."""
        query = torch.zeros(self._last - self._first, dtype=torch.long)
        query[[chunk.slot - self._first for chunk in self._singles]] = torch.tensor([c.start for c in self._singles])
        return self._visible(query.to(self._device), self._span, window)[:, None, None]

    def _chunk_mask(self, slot: int, window: int | None) -> Tensor:
        """Return the mask [count, stop]: the last query sees everything, or the last `window`."""
        chunk = next(chunk for chunk in self._long if chunk.slot == slot)
        return self._visible(torch.arange(chunk.start, chunk.stop, device=self._device), chunk.stop, window)

    def _visible(self, query: Tensor, num_keys: int, window: int | None) -> Tensor:
        distance = query[:, None] - torch.arange(num_keys, device=self._device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=self.cache.dtype, device=self._device).masked_fill_(hidden, -torch.inf)


class StaticSlots:
    """Computes what `CachedAttention` does for slots 0, 1, 2, ... with one new token each, without the host.

    positions, places: [rows], of the new token: what it attends as, and where its key and value go.
    """

    def __init__(self, cache: KVCache, positions: Tensor, places: Tensor, span: int) -> None:
        self._cache, self._positions, self._span = cache, positions, span
        self._rows = cache.rows_of(torch.arange(len(positions), device=positions.device), places)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self._cache.write(layer, self._rows, key, value)
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


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
