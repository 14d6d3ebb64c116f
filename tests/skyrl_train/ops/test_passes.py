"""The operations in C are those of torch, values and gradients, for both types of numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, tensor
from torch.testing import assert_close

from skyrl_train.ops import REFERENCE
from skyrl_train.ops.cpu.passes import Passes, passes_for

pytestmark = pytest.mark.skipif(passes_for(torch.float32) is None, reason="there is no C compiler")

EXACT: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def kernels(request: pytest.FixtureRequest) -> Passes:
    found = passes_for(request.param)
    assert found is not None
    return found


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact_gradients(out: Tensor, inputs: list[Tensor], pull: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, pull.double())


def in_double(*numbers: Tensor) -> list[Tensor]:
    return [number.double().requires_grad_() for number in numbers]


def test_norm_and_its_gradient(kernels):
    x, weight, pull, more = tensors(kernels.dtype, (37, 40), (40,), (37, 40), (37, 40))
    wide = in_double(x, weight)
    expected = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-3).rsqrt() * wide[1]
    grad_x, grad_weight = exact_gradients(expected, wide, pull)
    near = EXACT[kernels.dtype]
    assert_close(kernels.norm(x, weight, 1e-3).double(), expected, **near)
    ours_x, ours_weight = kernels.norm_backward(pull, x, weight, 1e-3)
    assert_close(ours_x.double(), grad_x, **near)
    assert_close(ours_weight.double(), grad_weight, rtol=1e-5, atol=1e-4)
    assert_close(kernels.norm_backward(pull, x, weight, 1e-3, more)[0].double(), grad_x + more.double(), **near)


def test_rotation_turns_pairs_of_halves_and_back(kernels):
    [x] = tensors(kernels.dtype, (5, 3, 8))
    angle = torch.randn(5, 4).repeat(1, 2)
    cosine, sine = (part.to(kernels.dtype) for part in (angle.cos(), angle.sin()))
    turned = kernels.rotated(x, cosine, sine)
    left, right = x.double().chunk(2, -1)
    c, s = cosine[:, None, :4].double(), sine[:, None, :4].double()
    expected = torch.cat([left * c - right * s, right * c + left * s], -1)
    assert_close(turned.double(), expected, **EXACT[kernels.dtype])
    assert_close(kernels.rotated(turned, cosine, sine, back=True), x, rtol=EXACT[kernels.dtype]["rtol"], atol=0.03)


def test_gated_activation_and_its_gradients(kernels):
    gate, up, pull = tensors(kernels.dtype, (9, 50), (9, 50), (9, 50))
    gate[0, :2] = tensor([-100.0, 100.0])
    wide = in_double(gate, up)
    expected = F.silu(wide[0]) * wide[1]
    assert_close(kernels.swiglu(gate, up).double(), expected, **EXACT[kernels.dtype])
    gated = pull.clone()
    ours = kernels.swiglu_backward(gate, up, gated)
    assert torch.equal(gated, kernels.swiglu(gate, up))
    for gradient, exact in zip(ours, exact_gradients(expected, wide, pull), strict=True):
        assert_close(gradient.double(), exact, **EXACT[kernels.dtype])


@pytest.mark.parametrize("parts", ["logprobs", "entropies", "both"])
def test_softmax_and_its_gradient_are_those_of_torch(kernels, parts):
    logits, pulls = tensors(kernels.dtype, (6, 3000), (2, 6))
    logits, targets = 5 * logits, torch.arange(6) * 400
    grad_logprobs = None if parts == "entropies" else pulls[0].float()
    grad_entropies = None if parts == "logprobs" else pulls[1].float()
    ours = kernels.logprobs(logits, targets, 0.7)
    theirs = REFERENCE.logprobs(logits, targets, 0.7)
    for value, expected in zip(ours, theirs, strict=True):
        assert_close(value, expected, rtol=1e-5, atol=1e-4)
    expected = logits.clone()
    REFERENCE.logprobs_backward(expected, targets, 0.7, *theirs[1:], grad_logprobs, grad_entropies)
    pull = torch.zeros(6) if grad_logprobs is None else grad_logprobs
    kernels.logprobs_backward(logits, targets, 0.7, *ours[1:], pull, grad_entropies)
    assert_close(logits, expected, **EXACT[kernels.dtype])


def test_logits_that_are_not_numbers_stay_so(kernels):
    logits = torch.zeros(2, 64, dtype=kernels.dtype)
    logits[1, 5] = float("nan")
    logprobs, _, entropies = kernels.logprobs(logits, tensor([0, 0]), 1.0)
    assert_close(logprobs[0], tensor(1 / 64).log())
    assert logprobs[1].isnan()
    assert entropies[1].isnan()


def test_square_sum(kernels):
    assert kernels.square_sum(torch.full((100_003,), 2.0)) == 400_012.0
