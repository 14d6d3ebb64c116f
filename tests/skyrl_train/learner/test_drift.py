"""Engine against learner: their logprobs are compared as they were before the update, each mini batch once."""

from __future__ import annotations

import pytest

from skyrl_train.learner.objective import Objective
from tests.skyrl_train.batches import random_batch
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("mini_batch", [1, 3])
def test_the_drift_is_that_of_the_logprobs_before_the_update(epochs, mini_batch):
    fast = {"lr": 0.1}  # the policy is somewhere else after each step
    config = trainer_config(
        optimizer=fast, policy_mini_batch_size=mini_batch, update_epochs_per_batch=epochs, max_tokens_per_microbatch=30
    )
    learner = learner_for(config)
    batch = prepared(learner, config)
    before = learner._logprobs(learner.policy, batch)
    metrics = learner.update(batch)
    difference = (before - batch.rollout_logprobs).abs()
    expected = difference[batch.loss_mask].mean()
    assert metrics["policy/rollout_train_logprobs_abs_diff_mean"] == pytest.approx(float(expected), rel=1e-4)
    for turn in (1, 2):
        here = batch.loss_mask & (batch.turn_index == turn)
        name = f"policy/rollout_train_logprobs_abs_diff_turn_{turn}"
        assert metrics[name] == pytest.approx(float(difference[here].mean()), rel=1e-4)


def test_later_epochs_do_not_compare_again(monkeypatch):
    compared: list[int] = []
    original = Objective.drift_metrics

    def counted(self, batch, old_logprobs):
        compared.append(batch.num_samples)
        return original(self, batch, old_logprobs)

    monkeypatch.setattr(Objective, "drift_metrics", counted)
    config = trainer_config(train_batch_size=4, policy_mini_batch_size=2, update_epochs_per_batch=3)
    learner = learner_for(config)
    learner.update(prepared(learner, config, random_batch(num_prompts=3, num_samples=4)))
    assert compared == [8, 4]  # two prompts, then the third
