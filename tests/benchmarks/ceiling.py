"""The upper bound of this machine's speed: the rates of bf16 matmuls and of reading memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from skyrl_train.ops.cpu import huge_pages


class Ceiling:
    """Rates of this machine, measured between the rounds of a benchmark; the medians are used."""

    def __init__(self, model: Path, rows: int) -> None:
        """rows: number of tokens in a matmul of a layer, for `own_product_rate`."""
        self.num_parameters, self._attention_width = num_parameters(model), attention_width(model)
        self._shapes, self._rows = product_shapes(model), rows
        self._products: list[float] = []
        self._own_products: list[float] = []
        self._reads: list[float] = []

    def measure(self) -> None:
        self._products.append(product_rate())
        self._own_products.append(own_product_rate(self._shapes, self._rows))
        self._reads.append(read_rate())

    @property
    def product_rate(self) -> float:
        """The floating point operations per second of one large matmul."""
        return median(self._products)

    @property
    def own_product_rate(self) -> float:
        """The floating point operations per second of a layer's matmuls, forward and backward."""
        return median(self._own_products)

    def decode_tokens_per_second(self, rows: int) -> float:
        """Return the tokens per second of decoding `rows` sequences, without the cost of attention.

        A step reads every bf16 weight once and multiplies it by every row.
        """
        size = self.num_parameters
        return rows / max(2 * size / median(self._reads), 2 * size * rows / self.product_rate)

    def update_operations(self, num_tokens: int, num_seen: int) -> float:
        """Return the floating point operations of forward and backward.

        6 per parameter and token, and 12 per layer and element of its query heads for each token that a token attends
        to (Chowdhery et al., 2022, appendix B; here causal). num_seen: the sum of those attended tokens.
        """
        return 6 * self.num_parameters * num_tokens + 12 * self._attention_width * num_seen

    def update_seconds(self, num_tokens: int, num_seen: int) -> float:
        """Return the seconds of an update at the rate of one large matmul."""
        return self.update_operations(num_tokens, num_seen) / self.product_rate


def product_rate(rows: int = 2048, width: int = 2048) -> float:
    """Measure and return the bf16 floating point operations per second of one large matmul."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
    return 2 * rows * width * rows / _seconds(lambda: left @ right.T)


def own_product_rate(shapes: list[tuple[int, int]], rows: int) -> float:
    """Measure and return the rate of linear layers [in, out] on `rows` tokens: outputs and both gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = 0.0
    for size_in, size_out in shapes:
        x, gradient, weight = (
            torch.randn(extent, device=device).bfloat16()
            for extent in ((rows, size_in), (rows, size_out), (size_out, size_in))
        )
        for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            seconds += _seconds(partial(torch.matmul, left, right), times=3)
    return sum(6 * rows * size_in * size_out for size_in, size_out in shapes) / seconds


def product_shapes(model: Path) -> list[tuple[int, int]]:
    """Return [in, out] of the linear layers in a model's first layer."""
    return [(shape[1], shape[0]) for name, shape in tensor_shapes(model) if ".layers.0." in name and len(shape) == 2]


def read_rate(num_bytes: int = 1 << 28) -> float:
    """Measure and return the bytes per second that a sum reads from memory (in huge pages on a CPU)."""
    shape = (num_bytes // 4,)
    numbers = torch.ones(shape, device="cuda") if torch.cuda.is_available() else huge_pages.zeros(shape, torch.float32)
    numbers.fill_(1)
    return num_bytes / _seconds(numbers.sum)


def num_parameters(model: Path) -> int:
    """Return the number of weights, each of which a token is multiplied by; tied embeddings count once, as the head."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(model))


def attention_width(model: Path) -> int:
    """Return the number of elements of all query heads of all layers."""
    return sum(shape[0] for name, shape in tensor_shapes(model) if name.endswith("q_proj.weight"))


def tensor_shapes(model: Path) -> list[tuple[str, list[int]]]:
    """Return (name, shape) of all weights in a Hugging Face folder."""
    from safetensors import safe_open

    shapes = []
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes += [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    return shapes


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
