"""Turns joined into one row have the gradient of the turns as rows of their own, in float32 to 1e-6."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from skyrl_train.batch.packing import pack
from skyrl_train.batch.steps import merged, steps
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.learner.passes import Budget, shares
from skyrl_train.types import Batch, Sample
from tests.skyrl_train.learner.test_critic import config_of, critic_of
from tests.skyrl_train.learner.test_learner import (
    gradients_of,
    learner_for,
    prepared,
    relative_difference,
    trainer_config,
)
from tests.tiny_models import tiny_policy

# Losses that look at each token alone. gspo and the sequence ratios of off_policy_correction look at a sample.
TOKEN_LOSSES = ["dual_clip", "cispo", "sapo", "dppo", "rollout_is", "importance_sampling"]


def episodes(seed: int = 0) -> list[Sample]:
    """Return 3 groups of 3 episodes, of 1 to 4 turns each: random tokens, turn rewards and logprobs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for group in range(3):
        prompt = [draw(0, 256) for _ in range(20)]
        for repetition in range(3):
            ids, mask, rewards = list(prompt), [False] * 20, [0.0] * 20
            for _ in range(draw(1, 5)):
                num_seen, num_said = draw(1, 6), draw(1, 9)
                ids += [draw(0, 256) for _ in range(num_seen + num_said)]
                mask += [False] * num_seen + [True] * num_said
                rewards += [0.0] * (num_seen + num_said - 1) + [float(draw(0, 4))]
            logprobs = [-4.0 - draw(0, 20) / 8 if bit else 0.0 for bit in mask]
            found.append(Sample(ids, mask, logprobs, rewards, 20, str(group), f"{group}_{repetition}"))
    return found


def joined_and_apart() -> tuple[Batch, Batch]:
    apart = [step for sample in episodes() for step in steps(sample)]
    assert merged(apart) == episodes()
    assert len(apart) >= 2 * len(episodes())
    return pack(episodes()), pack(apart)


@pytest.mark.parametrize(
    ("estimator", "reduction"),
    [
        ("grpo", "token_mean"),
        ("rloo", "sequence_mean"),
        ("maxrl", "seq_mean_token_sum_norm"),
        ("reinforce++", "sequence_mean"),
    ],
)
def test_the_gradient_does_not_show_which_turns_were_joined(estimator, reduction, monkeypatch):
    algorithm = {
        "advantage_estimator": estimator,
        "loss_reduction": reduction,
        "max_seq_len": 50,
        "kl_loss_coef": 0.1,
        "use_entropy_loss": True,
    }
    check(algorithm, monkeypatch)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_under_every_loss_of_single_tokens(loss, monkeypatch):
    check({"policy_loss_type": loss, "kl_loss_coef": 0.1}, monkeypatch, max_tokens_per_microbatch=60)


def check(algorithm: dict[str, Any], monkeypatch: Any, **trainer: Any) -> None:
    config, reference = trainer_config(algorithm, **trainer), tiny_policy(seed=1)
    found = []
    for batch in joined_and_apart():
        batch = prepared(learner_for(config, reference=reference), config, batch)
        batch = replace(batch, old_logprobs=batch.rollout_logprobs)  # far away, so that clips act
        found.append(gradients_of(config, batch, monkeypatch, reference=reference))
    (joined, metrics), (apart, others) = found
    assert sum(float(gradient.norm()) for gradient in joined.values()) > 0
    assert relative_difference(apart, joined) < 1e-6
    for name in ("policy/policy_loss", "policy/policy_kl", "policy/policy_entropy"):
        assert metrics[name] == pytest.approx(others[name], rel=1e-4, abs=1e-6), name


def test_ppo_with_a_critic_learns_the_same_from_both(monkeypatch):
    config = config_of({"gamma": 0.9})
    found = []
    for batch in joined_and_apart():
        learner = TorchLearner(tiny_policy(), config, num_training_steps=10, critic=critic_of())
        found.append((prepared(learner, config, batch), learner))
    (joined, _), (apart, _) = found
    for name in ("advantages", "returns", "values"):
        ours, theirs = getattr(joined, name)[joined.loss_mask], getattr(apart, name)[apart.loss_mask]
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    metrics = [learner.update(batch) for batch, learner in found]
    for name in ("critic/critic_loss", "critic/grad_norm", "policy/grad_norm"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_turns_of_a_group_stay_on_one_rank(size):
    _, apart = joined_and_apart()
    groups = [{int(apart.group_index[sample]) for sample in share} for share in shares(apart, size)]
    assert sorted(group for share in groups for group in share) == [0, 1, 2]
    assert all(Budget(10_000).cut(apart.select(share)) == [list(range(len(share)))] for share in shares(apart, size))
