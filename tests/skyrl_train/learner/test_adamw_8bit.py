"""Moments of 8 bits: they follow float32 ones, and a resumed run continues bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from skyrl_train.config import OptimizerConfig
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.learner.ranks import ONE_PROCESS
from skyrl_train.learner.saved import SavedLearner, write_rank
from skyrl_train.ops import ops_for
from skyrl_train.policy.memory_plan import MOMENTS_BYTES

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: uv sync --inexact --extra quantized")

SHAPE = (100, 100)  # not a whole number of blocks


def start(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))


def optimizer_of(weight: nn.Parameter, optim: str, *, weight_decay: float = 0.01) -> MasterOptimizer:
    config = OptimizerConfig(lr=1e-3, optim=optim, max_grad_norm=1.0, weight_decay=weight_decay)
    return MasterOptimizer([("weight", weight), ("norm", nn.Parameter(torch.ones(8)))], config, 100)


def gradient_of(step: int, decades: float) -> Tensor:
    """Return gradients whose sizes differ by so many powers of ten along a row; they have a direction in common."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
    return torch.logspace(-decades, 0, SHAPE[1]) * (0.3 + noise)


def train(optimizer: MasterOptimizer, weight: nn.Parameter, steps: range, decades: float = 1.0) -> None:
    for step in steps:
        ((weight.float() * gradient_of(step, decades)).sum() + optimizer.parameters["norm"].sum()).backward()
        optimizer.step()


def moved(optim: str, num_steps: int, decades: float) -> Tensor:
    weight = start(torch.float32)
    optimizer = optimizer_of(weight, optim)
    train(optimizer, weight, range(num_steps), decades)
    return optimizer.masters["weight"].detach() - start(torch.float32)


def test_the_first_step_is_that_of_float32_moments():
    torch.testing.assert_close(moved("adamw_8bit", 1, 3.0), moved("adamw", 1, 3.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("decades", "bound"), [(0.0, 0.03), (1.0, 0.05), (2.0, 0.15)])
def test_fifty_steps_stay_near_those_of_float32_moments(decades, bound):
    """The more the gradients within a block of 256 numbers differ, the coarser are the moments of the small ones."""
    ours, theirs = (moved(optim, 50, decades) for optim in ("adamw_8bit", "adamw"))
    distance = float((ours - theirs).norm() / theirs.norm())
    assert 1e-3 < distance < bound


def test_a_step_is_the_librarys_own_on_the_clipped_gradient():
    from bitsandbytes.optim import AdamW8bit

    weight, same = start(torch.float32), start(torch.float32)
    optimizer = MasterOptimizer(
        [("weight", weight)], OptimizerConfig(lr=1e-3, optim="adamw_8bit", max_grad_norm=1.0, weight_decay=0.1), 100
    )
    theirs = AdamW8bit([same], lr=1e-3, weight_decay=0.1)
    for step in range(10):
        gradient = gradient_of(step, 1.0)
        (weight * gradient).sum().backward()
        norm = optimizer.step().grad_norm
        same.grad = gradient * (1.0 / norm)
        theirs.step()
    torch.testing.assert_close(weight.detach(), same.detach(), rtol=1e-6, atol=1e-7)
    assert float((weight - start(torch.float32)).abs().mean()) > 1e-3


def test_a_bfloat16_weight_is_its_master_rounded_as_ever():
    weight = start(torch.bfloat16)
    optimizer = optimizer_of(weight, "adamw_8bit")
    train(optimizer, weight, range(3))
    after = weight.detach().clone()
    assert torch.equal(after, ops_for(weight.device, weight.dtype).rounded(optimizer.masters["weight"], weight.dtype))
    assert not torch.equal(after, start(torch.bfloat16))
    optimizer._adamw.copy_into_parameters()  # as after a resume
    assert torch.equal(weight.detach(), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_state_continues_bit_for_bit(dtype, tmp_path: Path):
    unbroken, resumed = start(dtype), nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
    optimizer, other = (optimizer_of(weight, "adamw_8bit") for weight in (unbroken, resumed))
    train(optimizer, unbroken, range(3))
    write_rank(tmp_path, optimizer.parts(), {"optimizer": optimizer.plain_state()}, ONE_PROCESS)
    train(optimizer, unbroken, range(3, 6))
    other.load(SavedLearner(tmp_path))
    train(other, resumed, range(3, 6))
    assert torch.equal(resumed, unbroken)
    for name, part in optimizer.parts().items():
        assert torch.equal(other.parts()[name].rows, part.rows), name


def test_moments_take_a_quarter_of_the_memory_and_small_weights_keep_float32():
    weight = start(torch.float32)
    optimizer = optimizer_of(weight, "adamw_8bit")
    train(optimizer, weight, range(1))
    parts = {name: part.rows for name, part in optimizer.parts().items() if not name.startswith("masters")}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in parts.items()}
    of_weight = sum(size for name, size in sizes.items() if name.endswith("/weight"))
    assert of_weight == 2 * (10_000 + 4 * 40)  # 40 blocks of 256
    assert of_weight == pytest.approx(MOMENTS_BYTES["adamw_8bit"] * 10_000, rel=1e-3)
    assert parts["exp_avg/norm"].dtype == torch.float32
