"""The most this machine could do: the rate of its bf16 products, and of reading memory."""

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
    """Measured between the rounds of a benchmark; medians count."""

    def __init__(self, model: Path, rows: int) -> None:
        """rows: tokens that a layer's products see at once, for `own_product_rate`."""
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
        """Floating point operations per second of one large product."""
        return median(self._products)

    @property
    def own_product_rate(self) -> float:
        """The same of the products that a layer of the model makes forward and backward."""
        return median(self._own_products)

    def decode_tokens_per_second(self, rows: int) -> float:
        """A step of decoding reads every bf16 weight once and multiplies it by every row; attention comes free here."""
        size = self.num_parameters
        return rows / max(2 * size / median(self._reads), 2 * size * rows / self.product_rate)

    def update_operations(self, num_tokens: int, num_seen: int) -> float:
        """Of forward and backward: 6 per parameter and token; 12 per layer and number of its query heads for each token
        that a token sees (Chowdhery et al., 2022, appendix B; here causal).
        """
        return 6 * self.num_parameters * num_tokens + 12 * self._attention_width * num_seen

    def update_seconds(self, num_tokens: int, num_seen: int) -> float:
        """At the rate of one large product."""
        return self.update_operations(num_tokens, num_seen) / self.product_rate


def product_rate(rows: int = 2048, width: int = 2048) -> float:
    """bf16 floating point operations per second of one large product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
    return 2 * rows * width * rows / _seconds(lambda: left @ right.T)


def own_product_rate(shapes: list[tuple[int, int]], rows: int) -> float:
    """The same of what linear layers [in, out] do to `rows` tokens: outputs, gradients of inputs and of weights."""
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
    """[in, out] of the linear layers in the first of a model's layers."""
    return [(shape[1], shape[0]) for name, shape in tensor_shapes(model) if ".layers.0." in name and len(shape) == 2]


def read_rate(num_bytes: int = 1 << 28) -> float:
    """Bytes per second that a sum over memory reads, in large pages on a processor."""
    shape = (num_bytes // 4,)
    numbers = torch.ones(shape, device="cuda") if torch.cuda.is_available() else huge_pages.zeros(shape, torch.float32)
    numbers.fill_(1)
    return num_bytes / _seconds(numbers.sum)


def num_parameters(model: Path) -> int:
    """Those that a token is multiplied by: all, with tied embeddings counted once, as the head."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(model))


def attention_width(model: Path) -> int:
    """Numbers of all query heads of all layers."""
    return sum(shape[0] for name, shape in tensor_shapes(model) if name.endswith("q_proj.weight"))


def tensor_shapes(model: Path) -> list[tuple[str, list[int]]]:
    """Of all weights in a Hugging Face folder."""
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
