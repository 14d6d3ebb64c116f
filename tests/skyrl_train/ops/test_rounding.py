"""Masters into bfloat16 weights: on average the weights are where the masters are, however small the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from skyrl_train.config import OptimizerConfig
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.ops import REFERENCE, ops_for, reference
from skyrl_train.ops.base import AdamWSettings, MasterWeight
from skyrl_train.ops.cpu.passes import passes_for
from skyrl_train.policy.lora import LoraLinear, effective_weight
from tests.without_compiler import without_compiler

STEP = 2.0**-12  # of bfloat16's grid between 1/32 and 1/16


def rounded(masters: Tensor) -> Tensor:
    return ops_for(masters.device, torch.bfloat16).rounded(masters, torch.bfloat16)


def on_grid(count: int = 10_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def test_a_master_on_the_grid_is_copied():
    weights = torch.cat([on_grid(), torch.tensor([0.0, -0.0, 1e-40, 3e38]).bfloat16().float()])
    assert torch.equal(rounded(weights).float(), weights)


@pytest.mark.parametrize("part", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_as_many_weights_go_over_as_the_masters_have_come_of_a_step(part, sign):
    start = sign * (1 / 32 + 1 / 64)
    moved = rounded(torch.full((100, 100), start + part * STEP)) - start
    assert set(moved.unique().tolist()) == {0.0, STEP}
    assert float(moved.float().mean()) == pytest.approx(part * STEP, abs=1e-3 * STEP)


def test_a_weight_is_one_of_its_masters_two_neighbours_and_never_turns_back():
    start, before = on_grid(), on_grid()
    for part in torch.linspace(0, 1, 9):
        masters = start * (1 + part / 64)
        weights = rounded(masters).float()
        assert ((weights - masters).abs() < masters.abs() / 128).all()
        assert (weights.abs() >= before.abs()).all()
        before = weights


@pytest.mark.parametrize("first", [1, 7, 5000, 2**31 - 3, 2**32 + 11])
def test_a_part_is_rounded_as_a_part_of_the_whole(first):
    masters = on_grid() * 1.001
    ops = ops_for(masters.device, torch.bfloat16)
    assert torch.equal(ops.rounded(masters, torch.bfloat16, first), REFERENCE.rounded(masters, torch.bfloat16, first))
    parts = masters[:6000], masters[6000:]
    joined = torch.cat([rounded(parts[0]), ops.rounded(parts[1], torch.bfloat16, 6000)])
    assert torch.equal(joined, rounded(masters))
    assert not torch.equal(rounded(parts[1]), joined[6000:])


def test_every_number_counts_from_the_first_of_its_tensor(monkeypatch, no_compiler):
    masters = on_grid() * 1.001
    whole = rounded(masters)
    monkeypatch.setattr(reference, "ROUNDED_AT_ONCE", 999)
    assert torch.equal(rounded(masters), whole)
    assert torch.equal(rounded(masters.view(100, 100)).flatten(), whole)
    assert torch.equal(rounded(masters.view(100, 100).T.contiguous().T).flatten(), whole)


def test_the_kernels_round_as_torch_does_without_them():
    passes = passes_for(torch.bfloat16)
    if passes is None:
        pytest.skip("there is no C compiler")
    master, weights = on_grid(), torch.empty(10_000, dtype=torch.bfloat16)
    master.grad = torch.ones_like(master)
    moments = torch.zeros_like(master), torch.zeros_like(master), torch.ones(())
    parameter = nn.Parameter(weights, requires_grad=False)
    settings = AdamWSettings(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    passes.adamw(MasterWeight(master, parameter, master.grad, *moments), settings)
    assert torch.equal(weights, rounded(master))
    assert not torch.equal(weights, master.bfloat16())
    with without_compiler():
        assert torch.equal(weights, rounded(master))


def test_a_small_adapter_is_felt_in_the_weights_that_the_engine_reads():
    torch.manual_seed(0)  # the mean of 10,000 rounded changes is off by a tenth for 5 in 200 seeds
    layer = LoraLinear(nn.Linear(100, 100, bias=False).bfloat16(), rank=1, scale=1.0)
    layer.lora_A.data.fill_(1e-3)
    layer.lora_B.data.fill_(1e-2)
    change = effective_weight(layer).float() - layer.weight.detach().float()
    assert float(change.mean()) == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_update_moves_bfloat16_weights_on_average_by_the_learning_rate(compiled, request):
    if not compiled:
        request.getfixturevalue("no_compiler")
    weight = nn.Parameter(on_grid().bfloat16())
    before = weight.detach().float()
    optimizer = MasterOptimizer([("weight", weight)], OptimizerConfig(lr=1e-5, weight_decay=0.0), 1)
    weight.sum().backward()
    optimizer.step()
    assert float((before - weight.detach().float()).mean()) == pytest.approx(1e-5, rel=0.1)
    assert_close(before - optimizer.masters["weight"], torch.full_like(before, 1e-5), rtol=1e-2, atol=1e-6)


def test_other_types_are_rounded_to_the_nearest():
    masters = on_grid() * 1.001
    weights = ops_for(masters.device, torch.float32).rounded(masters, torch.float16)
    assert torch.equal(weights, masters.half())
