"""Triton kernels for attention of one new token per sequence to a cache. Programs share the keys of a long sequence.

Import it only where `ops.cuda.has_triton()`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_AT_ONCE = 64
LEAST_ROWS = 16  # of a matrix product in tensor cores: the query heads of one key head are padded to it
LEAST_KEYS = 256  # of one program: a shorter part costs more to combine than it saves
MOST_SPLITS = 64
PROGRAMS = 264  # two for each multiprocessor of a large GPU


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """Write key, value [T, kv_heads, D] into rows [T] of keys and values [N, kv_heads, D], in one kernel."""
    count, heads, dim = key.shape
    with on(key.device):
        _write[(count,)](
            key, value, keys, values, rows, key.stride(0), value.stride(0), keys.stride(0),
            heads * dim, BLOCK=triton.next_power_of_2(heads * dim),
        )  # fmt: skip


def attend(
    query: Tensor, keys: Tensor, values: Tensor, num_keys: Tensor, pages: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Attend with query [rows, heads, D] to keys and values [pages, page size, kv_heads, D] -> [rows, heads, D].

    Row r sees num_keys[r] keys, which fill the pages named in pages[r], or the last `window` of these. Every part of
    the keys gives a sum of values and its weight, and a second kernel joins them (FlashDecoding, Dao et al., 2023).
    """
    rows, heads, dim = query.shape
    page_size, groups = keys.shape[1:3]
    splits = num_splits(rows * groups, pages.shape[1] * page_size)
    out = torch.empty_like(query)
    sums = torch.empty((rows, heads, splits, dim), dtype=torch.float32, device=query.device) if splits > 1 else out
    weights = torch.empty((2, rows, heads, splits), dtype=torch.float32, device=query.device)
    with on(query.device):
        _attend[(rows, groups, splits)](
            query, keys, values, num_keys, pages, sums, weights[0], weights[1], query.stride(0), pages.stride(0),
            keys.stride(1), scale * 1.4426950408889634, window or 2**30, heads, PAGE=page_size, REPEATS=heads // groups,
            ROWS=max(LEAST_ROWS, triton.next_power_of_2(heads // groups)), DIM=dim,
            WIDE_DIM=max(LEAST_ROWS, triton.next_power_of_2(dim)), SPLITS=splits, BLOCK=KEYS_AT_ONCE,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _join[(rows * heads,)](
                sums, weights[0], weights[1], out, DIM=dim, WIDE_DIM=triton.next_power_of_2(dim), SPLITS=splits
            )
    return out


def num_splits(programs: int, length: int) -> int:
    """A power of two that makes `PROGRAMS` of so many programs and leaves each at least `LEAST_KEYS` of `length`."""
    wanted = min(PROGRAMS / programs, length / LEAST_KEYS, MOST_SPLITS)
    return 1 << max(int(wanted).bit_length() - 1, 0)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, whatever the tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _write(key, value, keys, values, rows, key_stride, value_stride, stride, count, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = tl.load(rows + token).to(tl.int64)
    places = tl.arange(0, BLOCK)
    is_number = places < count
    tl.store(keys + row * stride + places, tl.load(key + token * key_stride + places, mask=is_number), mask=is_number)
    tl.store(
        values + row * stride + places, tl.load(value + token * value_stride + places, mask=is_number), mask=is_number
    )


@triton.jit
def _attend(
    query,
    keys,
    values,
    num_keys,
    pages,
    sums,
    tops,
    totals,
    query_stride,
    pages_stride,
    token_stride,
    scale,  # times log2(e): weights are powers of two
    window,
    heads,
    PAGE: tl.constexpr,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group, split = tl.program_id(1), tl.program_id(2)
    end = tl.load(num_keys + row)
    begin = tl.maximum(end - window, 0)
    part = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
    start = begin + split * part
    stop = tl.minimum(start + part, end)
    r, d, k = tl.arange(0, ROWS), tl.arange(0, WIDE_DIM), tl.arange(0, BLOCK)
    head = group * REPEATS + r
    is_head, is_dim = r < REPEATS, d < DIM
    q = tl.load(
        query + row * query_stride + head[:, None] * DIM + d[None, :],
        mask=is_head[:, None] & is_dim[None, :],
        other=0.0,
    )
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDE_DIM), tl.float32)
    for at in range(start, stop, BLOCK):
        is_key = at + k < stop
        page = tl.load(pages + row * pages_stride + (at + k) // PAGE, mask=is_key, other=0).to(tl.int64)
        places = (page * PAGE + (at + k) % PAGE)[:, None] * token_stride + group * DIM + d[None, :]
        is_number = is_key[:, None] & is_dim[None, :]
        key = tl.load(keys + places, mask=is_number, other=0.0)
        scores = tl.where(is_key[None, :], tl.dot(q, tl.trans(key), input_precision="ieee") * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(values + places, mask=is_number, other=0.0)
        summed = summed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        top = new_top
    place = (row * heads + head) * SPLITS + split
    if SPLITS == 1:
        summed = summed / total[:, None]
    else:
        tl.store(tops + place, top, mask=is_head)
        tl.store(totals + place, total, mask=is_head)
    tl.store(
        sums + place[:, None] * DIM + d[None, :],
        summed.to(sums.dtype.element_ty),
        mask=is_head[:, None] & is_dim[None, :],
    )


@triton.jit
def _join(sums, tops, totals, out, DIM: tl.constexpr, WIDE_DIM: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, WIDE_DIM)
    is_dim = d < DIM
    tops_here = tl.load(tops + head * SPLITS + s)
    share = tl.exp2(tops_here - tl.max(tops_here, 0))  # 0 of a part without keys
    total = tl.sum(share * tl.load(totals + head * SPLITS + s), 0)
    parts = tl.load(sums + (head * SPLITS + s)[:, None] * DIM + d[None, :], mask=is_dim[None, :], other=0.0)
    joined = tl.sum(parts * share[:, None], 0) / total
    tl.store(out + head * DIM + d, joined.to(out.dtype.element_ty), mask=is_dim)
