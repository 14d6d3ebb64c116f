"""Keys and values on a GPU with a flash kernel, in pages, so that nothing shared is copied; and their attention.

Beside `kv_cache.py`, which gives every sequence a place of its own: here a prompt that many requests begin with, and
the turns that a session leaves behind, are pages with several holders (see `pages.py`). All memory is taken at once, so
recorded steps stay valid, and sessions keep what the sequences in flight do not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from skyrl_train.engine.torch.draws import sent
from skyrl_train.engine.torch.kv_cache import Chunk, KVCache, Saved
from skyrl_train.engine.torch.pages import Copy, KeptPages, Pages
from skyrl_train.ops.cuda import decode_attention, paged_attention, write_rows
from skyrl_train.ops.ragged import Ragged
from skyrl_train.policy.model import Policy

PAGE_SIZE = 256  # tokens; torch's flash kernel takes multiples of it
PAGES_AT_ONCE = 16  # that are copied together: the copy is made twice on the way


class PagedCache:
    """Keys and values of all sequences, in pages of one store for each layer: [pages, page_size, kv_heads, D]."""

    def __init__(
        self,
        policy: Policy,
        *,
        max_slots: int,
        max_length: int,
        max_bytes: int,
        evict: Callable[[], bool],
        page_size: int = PAGE_SIZE,
    ) -> None:
        """max_bytes: for sequences in flight and kept sessions; `evict` lets go of one of these, False if none is left.

        No more memory is taken than twice what all slots need at their longest: the other half is for sessions.
        """
        layers, heads, dim = policy.cache_shape
        page_bytes = 2 * layers * heads * dim * page_size * policy.compute_dtype.itemsize
        most = 2 * max_slots * -(-max_length // page_size)
        num_pages = min(max_bytes // page_bytes, most)
        self._pages = Pages(num_pages, page_size, num_slots=max_slots, max_length=max_length, evict=evict)
        shape = (layers, 2, num_pages + 1, page_size, heads, dim)  # zeros: a hidden position still multiplies its value
        self._store = torch.zeros(shape, dtype=policy.compute_dtype, device=policy.device)

    @property
    def page_size(self) -> int:
        return self._pages.page_size

    @property
    def max_tokens(self) -> int:
        """Return the most tokens that one sequence may have."""
        return self._pages.num_pages * self.page_size

    @property
    def num_slots(self) -> int:
        return len(self._pages.table)

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    def max_kept(self, session_bytes: int) -> int:
        """Return how many tokens a session may keep: any number, unless no memory at all was given to sessions."""
        return self.max_tokens if session_bytes else 0

    def num_that_fit(self, in_flight: Iterable[int], waiting: Iterable[int]) -> int:
        """Return how many sequences of these lengths fit beside those in flight, even if they come to share nothing."""
        needed = sum(map(self._pages.count, in_flight))
        count = 0
        for length in waiting:
            needed += self._pages.count(length)
            if needed > self._pages.num_pages:
                break
            count += 1
        return count

    def reserve(self, slots: int, length: int) -> None:
        """Do nothing: the memory is there, and `attention` gives pages to who computes."""

    def share(self, source: int, target: int, length: int) -> None:
        """Let slot `target` have the first `length` tokens of slot `source`."""
        self._pages.give(target, self._pages.held(source, length))

    def move(self, source: int, target: int, length: int) -> None:
        """Let slot `target` have all that slot `source` has, which is free then."""
        self._pages.move(source, target)

    def free(self, slot: int) -> None:
        self._pages.give(slot, [])

    def save(self, slot: int, length: int) -> KeptPages:
        """Keep the first `length` tokens of a slot until they are dropped."""
        return KeptPages(self._pages.held(slot, length))

    def load(self, slot: int, saved: Saved, length: int) -> None:
        """Let a slot have the first `length` tokens that were saved."""
        assert isinstance(saved, KeptPages)
        pages = saved.pages[: self._pages.count(length)]
        self._pages.hold(pages)
        self._pages.give(slot, pages)

    def drop(self, saved: Saved) -> None:
        assert isinstance(saved, KeptPages)
        self._pages.drop(saved.pages)

    def attention(self, chunks: list[Chunk]) -> PagedAttention:
        """Return the attention of a pass that computes these chunks, each of which gets pages that it alone holds."""
        self._copy([copy for c in chunks for copy in self._pages.make_writable(c.slot, c.start, c.stop)])
        return PagedAttention(self, chunks)

    def _copy(self, copies: list[Copy]) -> None:
        for first in range(0, len(copies), PAGES_AT_ONCE):
            pairs = torch.tensor([(copy.source, copy.target) for copy in copies[first : first + PAGES_AT_ONCE]])
            sources, targets = sent(pairs.t().contiguous(), self._store.device)
            self._store[:, :, targets] = self._store[:, :, sources]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each [pages, page_size, kv_heads, D]."""
        return self._store[index, 0], self._store[index, 1]

    def write(self, index: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Put key and value [T, kv_heads, D] of new tokens into rows [T] of one layer, all its pages end to end."""
        keys, values = (store.flatten(0, 1) for store in self.layer(index))
        write_rows(key, value, keys, values, rows)

    def places(self, slots: Tensor) -> Tensor:
        """Return the pages of these slots [N] on the host, [N, pages of the longest sequence] int32."""
        return self._pages.table[slots]

    def row_places(self, rows: int, slots: Tensor, positions: Tensor) -> Tensor:
        """Return what `StaticPages` reads: the pages of these slots, and `NOBODYS` in the rows behind them."""
        places = torch.zeros((rows, self._pages.table.shape[1]), dtype=torch.int32)
        places[: len(slots)] = self._pages.table[slots]
        return places

    def recorded(self, positions: Tensor, places: Tensor, span: int) -> StaticPages:
        """Return the attention of a recorded step."""
        return StaticPages(self, positions, places)

    @property
    def longest_span(self) -> int:
        """Return 0: a recorded step attends to sequences of any length, which the kernel reads from memory."""
        return 0


class PagedAttention:
    """Attention of one forward pass: chunks end to end in the row, those of one token first, in one call."""

    def __init__(self, cache: PagedCache, chunks: list[Chunk]) -> None:
        self.cache, self._chunks = cache, chunks
        self._singles = [chunk for chunk in chunks if chunk.count == 1]
        self._slots = torch.tensor([chunk.slot for chunk in chunks])

    @property
    def decoding_slots(self) -> Tensor:
        """Return the slots of the chunks of one token: [N] on the host."""
        return self._slots[: len(self._singles)]

    @property
    def decoding_rows(self) -> Tensor:
        """Return the row of a recorded step in which each of them stands: the first ones, whatever their slots."""
        return torch.arange(len(self._singles))

    @cached_property
    def decoding_alone(self) -> PagedAttention:
        return PagedAttention(self.cache, self._singles)

    @cached_property
    def without_decoding(self) -> PagedAttention:
        return PagedAttention(self.cache, self._chunks[len(self._singles) :])

    @cached_property
    def _ragged(self) -> Ragged:
        stops = [chunk.stop for chunk in self._chunks]
        pages = self.cache.places(self._slots)[:, : -(-max(stops) // self.cache.page_size)].contiguous()
        device = self.cache.layer(0)[0].device
        return Ragged.of([chunk.count for chunk in self._chunks], stops, device, pages=pages)

    @cached_property
    def _rows(self) -> Tensor:
        places, size = self.cache.places(self._slots), self.cache.page_size
        counts = torch.tensor([chunk.count for chunk in self._chunks])
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self._chunks])
        return sent(_row(places[owner], positions, size), self.cache.layer(0)[0].device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self.cache.write(layer, self._rows, key, value)
        return paged_attention(query, *self.cache.layer(layer), self._ragged, scale=scale, window=window)


class StaticPages:
    """Computes what `PagedAttention` does for one new token a row, without the host.

    positions [rows] of the new tokens; places [rows, P] int32: the pages of their sequences.
    """

    def __init__(self, cache: PagedCache, positions: Tensor, places: Tensor) -> None:
        self._cache, self._places = cache, places
        self._num_keys = positions + 1
        self._rows = _row(places, positions, cache.page_size)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self._cache.write(layer, self._rows, key, value)
        keys, values = self._cache.layer(layer)
        return decode_attention(query, keys, values, self._num_keys, self._places, scale=scale, window=window)


def _row(places: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Return the rows in the store, all pages end to end, of tokens with these pages [T, P] and positions [T]."""
    page = places.gather(1, (positions // page_size)[:, None])[:, 0]
    return page.long() * page_size + positions % page_size


Cache = KVCache | PagedCache
