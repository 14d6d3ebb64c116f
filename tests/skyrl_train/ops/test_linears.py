"""Linear layers laid out for few rows, against their own forward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from skyrl_train.ops.cpu.decode_kernels import DecodeKernels, NoKernels, Shape
from skyrl_train.ops.cpu.huge_pages import Buffers
from skyrl_train.ops.cpu.linears import PackedGate, PackedLinear, PackedWeight, TiledLinear, packed

ROWS = (1, 15, 16, 17, 32, 33, 300)  # less, as much and more than a tile, than two, than stay in the cache


@pytest.fixture
def kernels() -> DecodeKernels:
    """With tiles."""
    try:
        made = DecodeKernels(Shape(4, 2, 8, torch.bfloat16))
    except NoKernels as reason:
        pytest.skip(str(reason))
    if not made.has_tiles:
        pytest.skip("this CPU has no AMX")
    return made


def layer(inputs: int, outputs: int, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)


def weight_of(linear: nn.Linear) -> Tensor:
    return linear.weight


def numbers(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(linears: list[nn.Linear], rows: Tensor) -> Tensor:
    parts = [
        F.linear(rows.double(), of.weight.double(), None if of.bias is None else of.bias.double()) for of in linears
    ]
    return torch.cat(parts, 1)


def assert_rounded(ours: Tensor, expected: Tensor) -> None:
    assert_close(ours.double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("rows", ROWS)
@torch.inference_mode()
def test_layers_that_share_their_input_are_one_matmul(kernels, rows):
    linears = [layer(96, 64), layer(96, 16, seed=1), layer(96, 16, bias=True, seed=2)]
    tiled, x = packed(linears, kernels, Buffers(), weight_of), numbers(rows, 96)
    assert isinstance(tiled, TiledLinear)
    assert_rounded(tiled(x), exact(linears, x))


@pytest.mark.parametrize("rows", ROWS)
@torch.inference_mode()
def test_a_residual_is_added_before_rounding(kernels, rows):
    linears = [layer(64, 32, bias=True)]
    tiled, x, residual = packed(linears, kernels, Buffers(), weight_of), numbers(rows, 64), numbers(rows, 32, seed=3)
    assert_rounded(tiled.added_to(residual, x), exact(linears, x) + residual.double())


@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "oneDNN"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@torch.inference_mode()
def test_a_gate_lets_its_own_columns_pass(kernels, rows, bias, tiles):
    linears = [layer(32, 48, bias=bias), layer(32, 48, bias=bias, seed=1)]
    gated = (
        TiledLinear(linears, kernels, Buffers(), weight_of, gated=True)
        if tiles
        else PackedGate(linears, None, weight_of)
    )
    x = numbers(rows, 32)
    gate, up = (exact([of], x).bfloat16().double() for of in linears)  # each is rounded, as in the model
    assert_close(gated(x).double(), F.silu(gate) * up, rtol=2**-6, atol=2**-6)


@torch.inference_mode()
def test_new_weights_count_once_it_has_read_them(kernels):
    linears, x = [layer(32, 32, bias=True)], numbers(3, 32)
    tiled = packed(linears, kernels, Buffers(), weight_of)
    before = tiled(x)
    linears[0].weight.neg_()
    linears[0].bias.neg_()
    assert torch.equal(tiled(x), before)
    tiled.pack()
    assert torch.equal(tiled(x), -before)


@torch.inference_mode()
def test_not_a_number_stays_not_a_number(kernels):
    tiled = packed([layer(32, 32)], kernels, Buffers(), weight_of)
    assert tiled(torch.full((2, 32), torch.nan).bfloat16()).isnan().all()


@pytest.mark.parametrize("sizes", [(40, 32), (32, 40)])
def test_other_sizes_are_left_to_onednn(kernels, sizes):
    other: PackedWeight = packed([layer(*sizes)], kernels, Buffers(), weight_of)
    assert isinstance(other, PackedLinear)
    assert isinstance(packed([layer(32, 32)], None, Buffers(), weight_of), PackedLinear)
