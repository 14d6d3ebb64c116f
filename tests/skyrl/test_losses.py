"""Losses as SkyRL's users write them: per token or one number, on padded tensors, tried before anything is loaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.algorithms.loss_style import LossReturns, LossStyle
from skyrl_train.batch.packing import with_loss_weights
from skyrl_train.config import AlgorithmConfig, ConfigError, load_config
from skyrl_train.learner.gradient import accumulate_gradient
from skyrl_train.learner.objective import Objective
from skyrl_train.learner.passes import Budget
from skyrl_train.types import Batch
from skyrl_train.users_functions import WrongFunction
from skyrl_train.utils.ppo_utils import ppo_critic_loss
from tests.skyrl_train.batches import random_batch
from tests.tiny_models import tiny_policy

HERE = __name__
MAX = max


def reinforce(log_probs, old_log_probs, advantages, config, loss_mask: Any = None, rollout_logprobs=None):
    """SkyRL's documented example: a plain mean over the padded batch, with a dummy clip ratio."""
    return (-log_probs * advantages).mean(), {"clip_ratio": 0.0}


def masked_mean(log_probs, old_log_probs, advantages, config, loss_mask: Any = None, rollout_logprobs=None):
    """Old style: the token mean over what it is given."""
    ratio = (log_probs - old_log_probs).exp()
    return -(ratio * advantages * loss_mask).sum() / loss_mask.sum(), {"seen": float(loss_mask.sum())}


def sequence_mean(log_probs, old_log_probs, advantages, config, loss_mask: Any = None):
    """Old style: each row's mean, then the mean of the rows. `dim=-1` of a flat tensor would be the whole batch."""
    loss = -(log_probs - old_log_probs).exp() * advantages
    return ((loss * loss_mask).sum(-1) / loss_mask.sum(-1).clamp(min=1)).mean(), 0.25


def new_style(log_probs, old_log_probs, advantages, config, loss_mask: Any = None, rollout_logprobs=None):
    """New style: a masked sum on advantages that were scaled before."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high)
    return (torch.maximum(-ratio * advantages, -clipped * advantages) * loss_mask).sum(), {}


def per_token(log_probs, old_log_probs, advantages, loss_mask):
    return -(log_probs - old_log_probs).exp() * advantages * loss_mask, {}


def other_names(new, old, adv, config, loss_mask: Any = None):
    return per_token(new, old, adv, loss_mask)


def by_place_alone(new, old, adv, /, config, loss_mask: Any = None):
    return per_token(new, old, adv, loss_mask)


def all_by_keyword(**kwargs):
    return per_token(*(kwargs[name] for name in ("log_probs", "old_log_probs", "advantages", "loss_mask")))


def row_ratio(log_probs, old_log_probs, advantages, loss_mask):
    """The ratio of the sequence, one loss per token: it must see rows."""
    log_ratio = ((log_probs - old_log_probs) * loss_mask).sum(-1, keepdim=True) / loss_mask.sum(-1, keepdim=True)
    return -log_ratio.exp() * advantages, {}


def ours(log_probs, advantages, loss_mask, sample_index):
    return torch.where(loss_mask, -log_probs * advantages, 0.0), None


def boolean_mask(log_probs, advantages, loss_mask):
    """A loss per token as our documentation defines one: loss_mask is bool."""
    return torch.where(loss_mask, -log_probs * advantages, 0.0), {}


def objective(name: str, **settings) -> Objective:
    return Objective(AlgorithmConfig(policy_loss_type=f"{HERE}:{name}", use_kl_loss=False, **settings))


@pytest.mark.parametrize(
    ("name", "is_padded", "returns"),
    [
        ("reinforce", True, LossReturns.MEAN),
        ("masked_mean", True, LossReturns.MEAN),
        ("sequence_mean", True, LossReturns.MEAN),
        ("new_style", True, LossReturns.SUM),
        ("per_token", True, LossReturns.TOKENS),
        ("other_names", True, LossReturns.TOKENS),
        ("by_place_alone", True, LossReturns.TOKENS),
        ("all_by_keyword", True, LossReturns.TOKENS),
        ("row_ratio", True, LossReturns.TOKENS),
        ("ours", False, LossReturns.TOKENS),
        ("boolean_mask", False, LossReturns.TOKENS),
    ],
)
def test_what_a_loss_takes_and_returns_is_found_by_trying_it(name, is_padded, returns):
    assert objective(name).style == LossStyle(is_padded, returns)


@pytest.fixture(scope="module")
def batch() -> Batch:
    batch = random_batch(num_prompts=2, num_samples=3)
    generator = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(batch.num_tokens, generator=generator)
    return with_loss_weights(
        replace(
            batch,
            advantages=torch.randn(batch.num_tokens, generator=generator),
            old_logprobs=torch.where(batch.loss_mask, -5.5 + noise, 0.0),
        ),
        "token_mean",
    )


def gradient(of: Objective, batch: Batch, max_samples: int | None) -> tuple[Tensor, dict[str, float]]:
    """The gradient of every weight of a tiny model, end to end, and the metrics."""
    policy = tiny_policy()
    _, metrics = accumulate_gradient(
        policy,
        of,
        batch,
        temperature=1.0,
        budget=Budget(10_000, max_samples),
        generator=torch.Generator().manual_seed(0),
        on_tokens=lambda num_tokens: None,
    )
    gradients = [weight.grad.flatten() for weight in policy.weights.values() if weight.grad is not None]
    return torch.cat(gradients), metrics.means()


@pytest.mark.parametrize("name", ["reinforce", "masked_mean", "sequence_mean", "new_style", "per_token", "row_ratio"])
def test_no_cut_of_the_batch_shows_in_the_gradient(name, batch):
    whole, metrics = gradient(objective(name), batch, None)
    cut, metrics_of_cut = gradient(objective(name), batch, 1)
    assert whole.abs().max() > 1e-4
    assert_close(cut, whole, rtol=1e-4, atol=1e-6)
    assert metrics_of_cut["policy_loss"] == pytest.approx(metrics["policy_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "reduction", "same_as"),
    [
        ("masked_mean", "token_mean", "per_token"),
        ("sequence_mean", "sequence_mean", "per_token"),
        ("new_style", "token_mean", "regular"),
        ("new_style", "sequence_mean", "regular"),
        ("other_names", "token_mean", "per_token"),
    ],
)
def test_each_style_has_the_gradient_of_our_own_form(name, reduction, same_as, batch):
    weighed = with_loss_weights(batch, reduction)
    ours = same_as if same_as == "regular" else f"{HERE}:{same_as}"
    config = AlgorithmConfig(policy_loss_type=ours, use_kl_loss=False, eps_clip_low=0.9, eps_clip_high=9.0)
    expected, _ = gradient(Objective(config), weighed, 2)
    found, _ = gradient(objective(name, eps_clip_low=0.9, eps_clip_high=9.0), weighed, 2)
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_lone_clip_ratio_becomes_a_metric_and_a_mean_sees_the_whole_mini_batch(batch):
    assert gradient(objective("sequence_mean"), batch, 1)[1]["loss_metrics/clip_ratio"] == 0.25
    assert gradient(objective("masked_mean"), batch, 1)[1]["loss_metrics/seen"] == float(batch.loss_mask.sum())


def detached(log_probs, old_log_probs, advantages, loss_mask):
    return -(log_probs.detach() * advantages).mean(), {}


def flat_everywhere(log_probs, advantages, loss_mask):
    return (log_probs * 0.0).sum() / loss_mask.sum(), {}


def per_row(log_probs, advantages, loss_mask):
    return (-log_probs * advantages * loss_mask).sum(-1), {}


def no_metrics(log_probs, advantages):
    return (-log_probs * advantages).mean()


def plain_sum(log_probs, loss_mask):
    return (-log_probs * loss_mask).sum(), {}


def square_root(log_probs, advantages, loss_mask):
    return (-log_probs * advantages * loss_mask).sum() / loss_mask.sum() ** 0.5, {}


def wants_more(log_probs, teacher):
    return log_probs, {}


def wants_a_third(log_probs, old_log_probs, teacher):
    return log_probs, {}


def breaks(log_probs, advantages):
    return log_probs @ advantages, {}


def leaves(log_probs):
    sys.exit(3)


async def later(log_probs):
    return log_probs, {}


def not_a_number(log_probs, advantages, loss_mask):
    return -log_probs * advantages * float("nan"), {}


def divides_by_the_mask(log_probs, advantages, loss_mask):
    return -log_probs * advantages / loss_mask, {}


def zero_per_token(log_probs, advantages, loss_mask):
    return log_probs * 0.0, {}


def zero_for_ours(log_probs, sample_index):
    return log_probs * 0.0, {}


def several_metrics(log_probs, advantages, loss_mask):
    return -log_probs * advantages, {"kl": loss_mask}


def summed_though_flat(log_probs, sample_index):
    return log_probs.sum(), {}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("detached", r"detached has no gradient with respect to log_probs: it would train nothing"),
        ("flat_everywhere", r"has a gradient of 0 everywhere"),
        ("per_row", r"returned a tensor \[4\] as its loss for log_probs \[4, 5\] \[samples, response tokens\]"),
        ("no_metrics", r"returned a tensor \[\]; it must return \(loss, metrics\)"),
        ("plain_sum", r"neither a mean over the batch nor a masked sum that scales with the advantages"),
        ("square_root", r"twice the samples: 1.41 times the gradient"),
        ("wants_more", r"needs teacher, which is not offered"),
        ("wants_a_third", r"needs teacher, which is not offered"),
        (
            "breaks",
            rf"the policy loss {HERE}.breaks fails on a small batch: RuntimeError: .*test_losses.py:\d+ in breaks",
        ),
        ("leaves", r"leaves fails on a small batch: SystemExit: 3"),
        ("later", r"later is written with `async def`, and nobody awaits it"),
        ("MAX", r"builtins.max has no parameters that can be read"),
        ("not_a_number", r"has a gradient that is not finite"),
        ("divides_by_the_mask", r"has a gradient that is not finite"),
        ("zero_per_token", r"has a gradient of 0 everywhere"),
        ("zero_for_ours", r"has a gradient of 0 everywhere"),
        ("several_metrics", r"returned a tensor \[4, 5\] as its metric 'kl'; it must be one number"),
        ("summed_though_flat", r"one that asks for sample_index must return one loss per token"),
        ("nowhere", r"cannot be imported"),
    ],
)
def test_a_loss_that_cannot_be_minimised_is_found_at_start_up(name, says):
    with pytest.raises(WrongFunction, match=says):
        _ = objective(name).style


def test_one_number_takes_no_off_policy_correction():
    correction = load_config(
        ["trainer.algorithm.off_policy_correction.tis_ratio_type=token"]
    ).trainer.algorithm.off_policy_correction
    _ = objective("per_token", off_policy_correction=correction).style
    with pytest.raises(ValueError, match="returns one number, so its tokens cannot be corrected"):
        _ = objective("masked_mean", off_policy_correction=correction).style


def test_the_start_of_a_run_refuses_it_before_the_model(capsys):
    from skyrl_train.entrypoints.main_base import main

    assert main([f"trainer.algorithm.policy_loss_type={HERE}:per_row", "trainer.policy.model.path=/no/such"]) == 2
    assert "refused: the policy loss tests.skyrl.test_losses.per_row returned a tensor [4]" in capsys.readouterr().err


def test_a_name_that_is_none_is_still_refused():
    with pytest.raises(ConfigError, match="is not known"):
        AlgorithmConfig(policy_loss_type="my loss")


def test_the_critics_loss_is_that_of_padded_rows():
    values, old, returns = torch.tensor([[0.5, 9.0], [0.1, 0.5]]), torch.zeros(2, 2), torch.tensor([[1.0, 0], [1, -1]])
    mask = torch.tensor([[1, 0], [1, 1]])
    loss, clip_ratio = ppo_critic_loss(values, old, returns, AlgorithmConfig(value_clip=0.2), mask)
    # row 1: (0.2 - 1)^2 = 0.64;  row 2: (0.9^2 + 1.5^2) / 2 = 1.53;  0.5 * (0.64 + 1.53) / 2
    assert loss.item() == pytest.approx(0.5425)
    assert clip_ratio == pytest.approx(1 / 3)
    assert ppo_critic_loss(values, old, returns, AlgorithmConfig(value_clip=None))[1] is None
