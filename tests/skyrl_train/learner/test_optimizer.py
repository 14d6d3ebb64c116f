"""Master weights, the schedule, clipping, and gradients that are not finite."""

from typing import Any

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

from skyrl_train.config import OptimizerConfig
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.learner.ranks import ONE_PROCESS
from skyrl_train.learner.saved import SavedLearner, write_rank
from skyrl_train.ops import REFERENCE


def optimizer_of(parameter, *, num_training_steps=10, **config):
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0} | config
    return MasterOptimizer([("weight", parameter)], OptimizerConfig(**settings), num_training_steps)


def saved_by(optimizer, folder):
    write_rank(folder, optimizer.parts(), {"optimizer": optimizer.plain_state()}, ONE_PROCESS)
    return SavedLearner(folder)


def pull(parameter, gradient):
    (parameter * torch.as_tensor(gradient, dtype=parameter.dtype)).sum().backward()


def test_the_first_adam_step_has_the_size_of_the_learning_rate():
    weight = nn.Parameter(tensor([1.0, 1.0]))
    optimizer = optimizer_of(weight)
    pull(weight, [0.5, -2.0])
    step = optimizer.step()
    assert_close(weight.detach(), tensor([0.9, 1.1]))
    assert step.grad_norm == pytest.approx((0.25 + 4.0) ** 0.5)
    assert weight.grad is None


def test_weight_decay_is_decoupled():
    weight = nn.Parameter(tensor([2.0]))
    optimizer = optimizer_of(weight, weight_decay=0.5)
    pull(weight, [1.0])
    optimizer.step()
    assert_close(weight.detach(), tensor([2.0 - 2.0 * 0.1 * 0.5 - 0.1]))


def test_bfloat16_weights_collect_updates_that_bfloat16_alone_would_lose():
    weight = nn.Parameter(tensor([1.0], dtype=torch.bfloat16))
    optimizer = optimizer_of(weight, lr=1e-3)  # below 1/256: bfloat16's 1.0 - 0.001 is 1.0
    assert weight.detach() - tensor(1e-3, dtype=torch.bfloat16) == 1.0
    for _ in range(10):
        pull(weight, [1.0])
        optimizer.step()
    assert_close(optimizer.masters["weight"], tensor([0.99]))
    assert weight.item() == tensor(0.99).bfloat16().item() < 1.0


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    weight = nn.Parameter(tensor([1.0], dtype=torch.bfloat16))
    optimizer = optimizer_of(weight)
    for gradient in [1.0] + [2.0**-9] * 64:  # 64 x 2^-9 = 0.125; in bfloat16 1 + 2^-9 = 1
        pull(weight, [gradient])
    assert weight.grad is None
    assert optimizer.step().grad_norm == 1.125


def test_clipping_scales_the_whole_gradient():
    weight = nn.Parameter(tensor([0.0, 0.0]))
    optimizer = optimizer_of(weight, max_grad_norm=1.0, adam_betas=[0.0, 0.0])
    pull(weight, [3.0, 4.0])
    assert optimizer.step().grad_norm == pytest.approx(5.0)
    moment = optimizer.parts()["exp_avg/weight"].rows
    assert_close(moment, tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    weight = nn.Parameter(tensor([1.0, 1.0]))
    optimizer = optimizer_of(weight, num_warmup_steps=4)
    pull(weight, [1.0, 1.0])
    optimizer.step()
    before = weight.detach().clone()
    pull(weight, [bad, 1.0])
    step = optimizer.step()
    assert step.was_skipped
    assert torch.equal(weight.detach(), before)
    assert optimizer.learning_rate == pytest.approx(0.1 / 4)  # still the second step of the warm-up
    pull(weight, [1.0, 1.0])
    assert not optimizer.step().was_skipped
    assert not torch.equal(weight.detach(), before)


def test_the_schedule_follows_its_name():
    rates = []
    weight = nn.Parameter(tensor([1.0]))
    optimizer = optimizer_of(weight, scheduler="linear", num_warmup_steps=2, num_training_steps=6)
    for _ in range(7):
        pull(weight, [1.0])
        rates.append(optimizer.step().learning_rate)
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_state_continues_bit_for_bit(dtype, tmp_path):
    def steps(optimizer, weight, first, last):
        for i in range(first, last):
            pull(weight, [0.3 * i - 1.0, 0.1])
            optimizer.step()

    config = {"lr": 1e-3, "scheduler": "cosine", "num_warmup_steps": 3, "max_grad_norm": 0.5, "weight_decay": 0.01}
    unbroken = nn.Parameter(tensor([1.0, -0.5], dtype=dtype))
    optimizer = optimizer_of(unbroken, num_training_steps=10, **config)
    steps(optimizer, unbroken, 0, 5)
    saved = saved_by(optimizer, tmp_path)
    steps(optimizer, unbroken, 5, 9)

    resumed = nn.Parameter(torch.zeros(2, dtype=dtype))
    other = optimizer_of(resumed, num_training_steps=10, **config)
    other.load(saved)
    steps(other, resumed, 5, 9)
    assert torch.equal(other.masters["weight"], optimizer.masters["weight"])
    assert torch.equal(resumed, unbroken)


def test_a_single_number_is_saved_as_any_weight_is(tmp_path):
    weight, other = nn.Parameter(tensor(1.5)), nn.Parameter(tensor(0.0))
    optimizer_of(other).load(saved_by(optimizer_of(weight), tmp_path))
    assert torch.equal(other, weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    saved = saved_by(optimizer_of(nn.Parameter(tensor([1.0]))), tmp_path)
    other = MasterOptimizer([("bias", nn.Parameter(tensor([1.0])))], OptimizerConfig(), 10)
    with pytest.raises(ValueError, match="bias"):
        other.load(saved)
    wider = optimizer_of(nn.Parameter(tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match=r"the checkpoint's weight is \[1\], the model's \[2\]"):
        wider.load(saved)


def test_the_step_of_the_kernels_is_torchs(monkeypatch):
    """Ten steps with clipping, warm-up and decay, of a bfloat16 weight."""
    weights = []
    for one_pass in (True, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 100).bfloat16())
        optimizer = optimizer_of(weight, lr=0.01, weight_decay=0.1, max_grad_norm=0.5, num_warmup_steps=3)
        if not one_pass:
            monkeypatch.setattr(optimizer._adamw, "_ops", REFERENCE)
        for i in range(10):
            pull(weight, torch.sin(torch.arange(100.0) + i))
            optimizer.step()
        weights.append((optimizer.masters["weight"], optimizer._adamw.moments(optimizer.masters["weight"])))
        assert torch.equal(weight.detach(), REFERENCE.rounded(optimizer.masters["weight"], weight.dtype))
    (ours, our_state), (theirs, their_state) = weights
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert_close(our_state[name], their_state[name], rtol=1e-5, atol=1e-7)
