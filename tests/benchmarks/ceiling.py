"""The most this machine could do: the rate of its bf16 products, and of reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


class Ceiling:
    """Measured between the rounds of a benchmark; medians count."""

    def __init__(self) -> None:
        self._products: list[float] = []
        self._reads: list[float] = []

    def measure(self) -> None:
        self._products.append(product_rate())
        self._reads.append(read_rate())

    @property
    def product_rate(self) -> float:
        """Floating point operations per second."""
        return median(self._products)

    def decode_tokens_per_second(self, num_parameters: int, rows: int) -> float:
        """A step of decoding reads every bf16 weight once and multiplies it by every row; attention comes free here."""
        step_s = max(2 * num_parameters / median(self._reads), 2 * num_parameters * rows / self.product_rate)
        return rows / step_s

    def update_tokens_per_second(self, num_parameters: int) -> float:
        """Forward and backward are 6 operations per parameter and token; attention comes free here."""
        return self.product_rate / (6 * num_parameters)


def product_rate(rows: int = 2048, width: int = 2048) -> float:
    """bf16 floating point operations per second of one large product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
    return 2 * rows * width * rows / _seconds(lambda: left @ right.T)


def read_rate(num_bytes: int = 1 << 28) -> float:
    """Bytes per second that a sum over memory reads."""
    numbers = torch.ones(num_bytes // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    return num_bytes / _seconds(numbers.sum)


def num_parameters(model: Path) -> int:
    """Those that a token is multiplied by: all, with tied embeddings counted once, as the head."""
    from safetensors import safe_open

    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                size = 1
                for extent in tensors.get_slice(name).get_shape():
                    size *= extent
                total += size
    return total


def _seconds(work: Callable[[], object], times: int = 7) -> float:
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken)
