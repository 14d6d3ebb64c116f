"""The most this machine could do: the rate of its bf16 products, and of reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def product_rate(rows: int = 2048, width: int = 2048) -> float:
    """bf16 floating point operations per second of one large product."""
    left, right = (torch.randn(rows, width).bfloat16() for _ in range(2))
    return 2 * rows * width * rows / _seconds(lambda: left @ right.T)


def read_rate(num_bytes: int = 1 << 28) -> float:
    """Bytes per second that a sum over memory reads."""
    numbers = torch.ones(num_bytes // 4)
    return num_bytes / _seconds(numbers.sum)


def decode_tokens_per_second(num_parameters: int, rows: int) -> float:
    """A step of decoding reads every bf16 weight once and multiplies it by every row; attention comes free here."""
    step_s = max(2 * num_parameters / read_rate(), 2 * num_parameters * rows / product_rate())
    return rows / step_s


def _seconds(work: Callable[[], object], times: int = 7) -> float:
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)
