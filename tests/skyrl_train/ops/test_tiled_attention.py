"""Attention on AMX tiles is as close to the exact one as torch's in bfloat16: trees of segments, windows, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skyrl_train.ops.cpu.passes import passes_for
from skyrl_train.ops.cpu.tiled_attention import TiledAttention
from skyrl_train.policy.attention import PackedAttention

pytestmark = pytest.mark.skipif(
    not getattr(passes_for(torch.bfloat16), "has_tiles", False), reason="this CPU has no AMX tiles"
)

SHAPES = [
    ([0, 40], [-1], 4, 2, 32, None),
    ([0, 40, 75, 110, 130], [-1, 0, 0, -1], 9, 3, 64, None),
    ([0, 40, 75, 110, 130, 200], [-1, 0, 1, -1, 3], 4, 4, 64, 8),  # two deep; a rest sees the end of its prefix only
    ([0, 300, 600, 900, 940], [-1, 0, -1, -1], 6, 2, 128, 100),
    ([0, 1, 2, 3], [-1, 0, 1], 2, 1, 32, 2),
]


def values_and_gradients(of: PackedAttention, tensors: list[Tensor], window: int | None) -> list[Tensor]:
    *inputs, pull = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    query, key, value = inputs
    out = of.attend(0, query, key, value, scale=query.shape[-1] ** -0.5, window=window)
    return [out.detach(), *torch.autograd.grad(out, inputs, pull)]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("bounds", "before", "heads", "kv_heads", "size", "window"), SHAPES)
def test_values_and_gradients(bounds, before, heads, kv_heads, size, window, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(bounds[-1], n, size) for n in (heads, kv_heads, kv_heads, heads)]
    coarse = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    packed, other = (PackedAttention(torch.tensor(bounds), torch.tensor(before)) for _ in range(2))
    ours = values_and_gradients(packed, coarse, window)
    exact = values_and_gradients(packed, [tensor.double() for tensor in coarse], window)
    monkeypatch.setattr(TiledAttention, "fits", lambda passes, query: False)
    theirs = values_and_gradients(other, coarse, window)
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert error(our, true) < max(1.1 * error(their, true), 1e-6)


def test_a_second_pass_gives_the_same_bits():
    packed = PackedAttention(torch.tensor([0, 50, 90, 140]), torch.tensor([-1, 0, 0]))
    tensors = [torch.randn(140, heads, 64).bfloat16() for heads in (6, 2, 2, 6)]
    first, second = (values_and_gradients(packed, tensors, None) for _ in range(2))
    assert all(map(torch.equal, first, second))
