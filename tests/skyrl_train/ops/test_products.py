"""The products of linear layers in AMX tiles are those of float64, for whole and broken blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.config import OptimizerConfig
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.ops.cpu import products
from skyrl_train.ops.cpu.passes import Kernels, kernels_for
from skyrl_train.ops.weight_gradients import Product

BF16 = torch.bfloat16
NEAR: dict[str, Any] = {"rtol": 1e-2, "atol": 2e-2}  # one rounding of numbers around 1
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-4}  # float32 sums
ROWS = [32, 70, 2100]  # whole panels; a broken one; more than wait at once, and than a weight's gradient sums at once


@pytest.fixture(autouse=True)
def kernels() -> Kernels:
    found = kernels_for(BF16)
    if found is None or not found.has_tiles:
        pytest.skip("this processor has no AMX tiles, or there is no C compiler")
    return found


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(BF16)


def weight(outputs: int, inputs: int) -> Tensor:
    return normal(outputs, inputs, scale=inputs**-0.5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [32, 608, 2048, 4160])  # one step; some; a page apart; more than at once
def test_outputs_of_layers_that_share_their_input(rows, inputs):
    x, weights, biases = normal(rows, inputs), [weight(96, inputs), weight(32, inputs)], [normal(96), None]
    for y, w, b in zip(products.outputs(x, rows, weights, biases), weights, biases, strict=True):
        assert_close(y.double(), F.linear(x.double(), w.double(), None if b is None else b.double()), **NEAR)


@pytest.mark.parametrize("rows", ROWS)
def test_an_output_is_added_to_the_residual_or_written_where_it_is_wanted(rows):
    x, w, residual = normal(rows, 64), weight(96, 64), normal(rows, 96)
    [y] = products.outputs(x, rows, [w], [None], residual=residual)
    assert_close(y.double(), residual.double() + x.double() @ w.double().T, **NEAR)
    out = torch.empty_like(y)
    assert products.outputs(x, rows, [w], [None], out=out)[0] is out
    assert_close(out.double(), x.double() @ w.double().T, **NEAR)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [[64], [96, 32, 32], [2048], [4096, 96]])
def test_gradient_of_a_shared_input(rows, outputs):
    weights, of_ys = [weight(n, 96) for n in outputs], [normal(rows, n, scale=0.3) for n in outputs]
    expected = sum(of_y.double() @ w.double() for of_y, w in zip(of_ys, weights, strict=True))
    assert_close(products.gradient_of_input(of_ys, rows, weights).double(), expected, rtol=1e-2, atol=3e-2)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, *ROWS])
def test_gradients_of_weights_are_summed_in_float(rows, kernels):
    x, of_ys = normal(rows, 64), [normal(rows, 96), normal(rows, 32)]
    expected = [of_y.double().T @ x.double() for of_y in of_ys]
    sums = [torch.full((of_y.shape[1], 64), float("nan")) for of_y in of_ys]
    products.add_weight_gradients(kernels, of_ys, x, rows, [(total, True) for total in sums])
    for total, exact in zip(sums, expected, strict=True):
        assert_close(total.double(), exact, **EXACT)
    products.add_weight_gradients(kernels, of_ys, x, rows, [(sums[0], False), (sums[1], True)])
    assert_close(sums[0].double(), 2 * expected[0], **EXACT)
    assert_close(sums[1].double(), expected[1], **EXACT)


@pytest.mark.parametrize("rows", [1, *ROWS])
def test_the_gradient_of_a_weight_with_a_master_is_never_rounded(rows):
    layer = torch.nn.Parameter(weight(96, 64))
    master = MasterOptimizer([("weight", layer)], OptimizerConfig(), 10).masters["weight"]
    x, of_y = normal(rows, 64), normal(rows, 96)
    Product.apply(x, layer, None, None).backward(of_y)
    assert layer.grad is None
    assert master.grad is not None
    assert_close(master.grad.double(), of_y.double().T @ x.double(), **EXACT)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_biases", [False, True])
def test_a_gate_between_products_there_and_back(rows, has_biases, kernels):
    x, norm_weight, of_y = normal(rows, 64), normal(64), normal(rows, 64)
    weights, down = [weight(96, 64), weight(96, 64).flip(0)], weight(64, 96)
    biases = [normal(96), normal(96).flip(0)] if has_biases else [None, None]
    normed = products.normed_for(x, norm_weight, 1e-5, weights)
    assert normed.ndim == 4
    assert not normed.transpose(1, 2).reshape(-1, 64)[rows:].any()  # behind the last row
    assert torch.equal(products.rows_of(normed, rows), kernels.norm(x, norm_weight, 1e-5))
    gate, up, gated = products.gated_outputs(normed, rows, weights, biases)
    rows_normed = products.rows_of(normed, rows).double()
    for part, w, b in zip((gate, up), weights, biases, strict=True):
        expected = F.linear(rows_normed, w.double(), None if b is None else b.double())
        assert_close(products.rows_of(part, rows).double(), expected, **NEAR)
    wide = [products.rows_of(part, rows).double().requires_grad_() for part in (gate, up)]
    exact = F.silu(wide[0]) * wide[1]
    assert_close(products.rows_of(gated, rows).double(), exact.detach(), **NEAR)
    *of_parts, again = products.gradient_through_gate(of_y, down, gate, up)
    assert_close(again, gated)
    pull = of_y.double() @ down.double()
    for part, gradient in zip(of_parts, torch.autograd.grad(exact, wide, pull), strict=True):
        assert_close(products.rows_of(part, rows).double(), gradient, rtol=2e-2, atol=3e-2)
    [y] = products.outputs(gated, rows, [down], [None])
    assert_close(y.double(), products.rows_of(gated, rows).double() @ down.double().T, **NEAR)
    gradients = [torch.empty(96, 64) for _ in of_parts]
    products.add_weight_gradients(kernels, of_parts, normed, rows, [(gradient, True) for gradient in gradients])
    for gradient, part in zip(gradients, of_parts, strict=True):
        assert_close(gradient.double(), products.rows_of(part, rows).double().T @ rows_normed, **EXACT)


def test_a_gate_saturates_and_what_is_not_a_number_stays_so():
    x = torch.zeros(32, 32, dtype=BF16)
    x[:, 0] = torch.tensor([0.0, 300.0, -300.0, float("nan")] * 8)
    one = torch.zeros(32, 32, dtype=BF16)
    one[:, 0] = 1
    gate, up, gated = products.gated_outputs(x, 32, [one, one], [None, None])
    assert products.rows_of(gated, 32)[:3, 5].tolist() == pytest.approx(
        [0.0, 90_112.0, 0.0], abs=1e-30
    )  # the nearest to 90,000
    assert products.rows_of(gated, 32)[3].isnan().all()
    of_gate, of_up, _ = products.gradient_through_gate(torch.ones_like(x), one.T.contiguous(), gate, up)
    assert products.rows_of(of_gate, 32)[:3].isfinite().all()
    assert products.rows_of(of_up, 32)[2].abs().max() < 1e-30


def test_other_products_are_those_of_torch():
    fits = [weight(64, 32)]
    assert products.kernels_for_products(normal(40, 32), fits) is not None
    assert products.kernels_for_products(normal(31, 32), fits) is None
    assert products.kernels_for_products(normal(40, 40), [weight(64, 40)]) is None
    assert products.kernels_for_products(normal(40, 32), [weight(65, 32)]) is None
    assert products.kernels_for_products(normal(40, 32).float(), [weight(64, 32).float()]) is None
    x, w = normal(40, 40), weight(65, 40)
    assert torch.equal(
        products.outputs(x, 40, [w], [None], residual=normal(40, 65))[0], F.linear(x, w) + normal(40, 65)
    )
