"""The critic on a tiny model: the right gradient however the batch is cut or sharded, learning, and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.config import LoraConfig, TrainerConfig
from skyrl_train.config.critic import CriticConfig, CriticOptimizerConfig
from skyrl_train.learner.critic import CriticLearner
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.lora import add_adapters
from skyrl_train.policy.value_head import Critic, ValueHead, batch_values
from skyrl_train.types import Batch
from tests.skyrl_train.batches import random_batch, shared_batch
from tests.skyrl_train.learner.test_learner import trainer_config
from tests.tiny_models import tiny_policy

GAE: dict[str, Any] = {"use_kl_loss": False, "advantage_estimator": "gae", "lambd": 0.9}


def config_of(
    algorithm: dict[str, Any] | None = None, policy_lr: float = 1e-2, critic_lr: float = 1e-2, **trainer: Any
) -> TrainerConfig:
    critic = CriticConfig(optimizer_config=CriticOptimizerConfig(lr=critic_lr))
    return trainer_config({**GAE, **(algorithm or {})}, {"lr": policy_lr}, critic=critic, **trainer)


def critic_of(kind: str = "own", policy: Any = None, **model: Any) -> Critic:
    """Return a critic whose head is not zero, so that its trunk has a gradient from the first step on."""
    trunk = policy if kind == "shared" else tiny_policy(seed=3, **model)
    if kind == "adapters":
        add_adapters(trunk, LoraConfig(rank=2), seed=1)
    critic = Critic.on(trunk) if kind == "shared" else Critic.of(trunk)
    with torch.no_grad():
        critic.head.weight.add_(torch.linspace(-0.3, 0.3, 32))
    return critic


def learner_of(config: TrainerConfig, kind: str = "own") -> TorchLearner:
    policy = tiny_policy()
    return TorchLearner(policy, config, num_training_steps=10, critic=critic_of(kind, policy))


def prepared(learner: TorchLearner, config: TrainerConfig, batch: Batch) -> Batch:
    return add_advantages(learner.add_logprobs(batch), config.algorithm)


def gradients(config: TrainerConfig, batch: Batch, monkeypatch: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    learner = CriticLearner(critic_of(), config, num_training_steps=10)
    caught: dict[str, Tensor] = {}
    original = learner._optimizer.step

    def catch() -> Any:
        caught.update({name: p.grad.clone() for name, p in learner.critic.trained if p.grad is not None})
        return original()

    monkeypatch.setattr(learner._optimizer, "step", catch)
    return caught, learner.update(batch, learner.mini_batches(batch), lambda _: None)


def test_values_are_those_of_the_hidden_state_before_the_token_in_plain_transformers():
    critic, batch = critic_of(), random_batch()
    values = batch_values(critic, critic.head, batch).detach()
    critic.module.set_attn_implementation("eager")
    for i in range(batch.num_samples):
        first, stop = batch.offsets[i : i + 2].tolist()
        hidden = critic.module.base_model(batch.input_ids[None, first:stop]).last_hidden_state[0]
        expected = torch.cat([torch.zeros(1), (hidden @ critic.head.weight)[:-1]]) * batch.loss_mask[first:stop]
        assert_close(values[first:stop], expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_new_head_says_zero():
    assert ValueHead(4)(torch.ones(3, 4)).tolist() == [0.0, 0.0, 0.0]


def test_the_gradient_is_that_of_skyrls_formula(monkeypatch):
    """0.5 * mean over rows of mean over a row's sampled tokens of max((V - R)^2, (V_old + clip(V - V_old) - R)^2)."""
    config, batch = config_of({"value_clip": 0.05}, train_batch_size=3), random_batch()
    critic = critic_of()
    old = batch_values(critic, critic.head, batch).detach() + 0.1 * torch.randn(
        batch.num_tokens, generator=torch.Generator().manual_seed(0)
    )
    batch = replace(batch, values=old, returns=torch.linspace(-1, 1, batch.num_tokens))
    assert batch.returns is not None
    ours, metrics = gradients(config, batch, monkeypatch)

    values = batch_values(critic, critic.head, batch)
    clipped = old + (values - old).clamp(-0.05, 0.05)
    worse = torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
    rows = [worse[batch.loss_mask & (batch.sample_index == i)].mean() for i in range(batch.num_samples)]
    loss = 0.5 * torch.stack(rows).mean()
    loss.backward()
    assert metrics["critic/critic_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < metrics["critic/values_clipfrac"] < 1
    assert ours.keys() == {name for name, _ in critic.trained}
    for name, parameter in critic.trained:
        assert parameter.grad is not None
        assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("limits", [{"max_tokens_per_microbatch": 25}, {"micro_train_batch_size_per_gpu": 1}])
@pytest.mark.parametrize("make_batch", [random_batch, shared_batch])
def test_micro_batches_and_shared_prefixes_do_not_change_the_gradient(limits, make_batch, monkeypatch):
    batch = make_batch()
    batch = replace(batch, values=0.1 * batch.rollout_logprobs, returns=torch.linspace(-1, 1, batch.num_tokens))
    expected, expected_metrics = gradients(config_of(train_batch_size=5, policy_mini_batch_size=5), batch, monkeypatch)
    cut, metrics = gradients(config_of(train_batch_size=5, policy_mini_batch_size=5, **limits), batch, monkeypatch)
    for name, gradient in expected.items():
        assert_close(cut[name], gradient, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)


@pytest.mark.parametrize(("kind", "lr", "least"), [("own", 2e-2, 0.9), ("adapters", 2e-2, 0.9), ("shared", 5e-2, 0.3)])
def test_it_learns_the_returns_and_says_how_much_of_them_it_explains(kind, lr, least):
    config = config_of({"value_clip": None, "lambd": 1.0}, policy_lr=1e-4, critic_lr=lr, update_epochs_per_batch=4)
    learner, batch, seen = learner_of(config, kind), random_batch(), []
    for _ in range(8):
        seen.append(learner.update(prepared(learner, config, batch)))
    assert seen[0]["critic/explained_variance"] < 0.3
    assert (
        seen[-1]["critic/explained_variance"] > least
    )  # 0.99, 0.99 and 0.44; adapters at 5e-2 end wherever rounding leads
    assert seen[-1]["critic/critic_loss"] < seen[0]["critic/critic_loss"] / 2
    assert {"critic/grad_norm", "critic/critic_lr", "critic/returns_mean", "policy/grad_norm"} <= seen[0].keys()


def test_with_a_shared_trunk_the_value_loss_moves_the_head_alone_and_the_policy_keeps_its_parameters():
    config = config_of()
    learner = learner_of(config, "shared")
    assert learner._critic is not None
    assert [name for name, _ in learner._critic.critic.trained] == ["value_head.weight"]
    assert not any("value_head" in name for name in learner.policy.weights)
    batch = prepared(learner, config, random_batch())
    before = {name: weight.clone() for name, weight in learner.policy.weights.items()}
    head = learner._critic.critic.head.weight.clone()
    learner._critic.update(batch, learner._critic.mini_batches(batch), lambda _: None)
    assert all(torch.equal(before[name], weight) for name, weight in learner.policy.weights.items())
    assert all(weight.grad is None for weight in learner.policy.weights.values())
    assert not torch.equal(head, learner._critic.critic.head.weight)


def test_the_critic_has_mini_batches_of_its_own_and_its_tokens_count_in_the_progress():
    config = config_of(critic_mini_batch_size=1)
    learner, told = learner_of(config), []
    batch = prepared(learner, config, random_batch())
    assert learner._critic is not None
    assert len(learner._critic.mini_batches(batch)) == 3
    learner.update(batch, lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * batch.num_tokens, 2 * batch.num_tokens)
    assert learner.policy_version == 1


@pytest.mark.parametrize("kind", ["own", "adapters", "shared"])
def test_a_resumed_critic_goes_on_bit_for_bit_from_a_part_of_its_own(kind, tmp_path: Path):
    config = config_of(update_epochs_per_batch=2)
    learner = learner_of(config, kind)
    learner.update(prepared(learner, config, random_batch()))
    learner.save(tmp_path).result()
    assert (tmp_path / "critic" / "index.json").is_file()
    expected = learner.update(prepared(learner, config, random_batch(seed=1)))
    other = learner_of(config, kind)
    other.load(tmp_path)
    assert other.update(prepared(other, config, random_batch(seed=1))) == expected
    assert learner._critic is not None
    assert other._critic is not None
    for (name, ours), (_, theirs) in zip(learner._critic.critic.trained, other._critic.critic.trained, strict=True):
        assert torch.equal(ours, theirs), name


def test_a_checkpoint_without_a_critic_is_refused(tmp_path: Path):
    TorchLearner(tiny_policy(), config_of(), num_training_steps=10).save(tmp_path).result()
    with pytest.raises(ValueError, match="no learner was saved there"):
        learner_of(config_of()).load(tmp_path)


def test_in_bfloat16_the_head_has_a_float32_master_and_values_are_float32():
    critic = critic_of(compute_dtype=torch.bfloat16)
    learner = CriticLearner(critic, config_of(), num_training_steps=10)
    assert critic.head.weight.dtype == torch.bfloat16
    assert learner._optimizer.masters["value_head.weight"].dtype == torch.float32
    assert learner.values(random_batch()).dtype == torch.float32
