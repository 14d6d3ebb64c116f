"""Steps that cannot teach anything: not made where no advantage is left, refused where the gradient got lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.batch.packing import pack
from skyrl_train.config import AlgorithmConfig, OptimizerConfig, TrainerConfig
from skyrl_train.config.models import PolicyConfig
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.learner.lost_gradient import GradientLost
from skyrl_train.types import Batch
from tests.skyrl_train.batches import random_batch, sample
from tests.tiny_models import tiny_policy

WITHOUT = "policy/num_steps_without_advantage"


def learner_for(algorithm: dict[str, Any], dtype: torch.dtype = torch.float32, **trainer: Any) -> TorchLearner:
    settings: dict[str, Any] = {"train_batch_size": 3, "policy_mini_batch_size": 3, **trainer}
    with_defaults: dict[str, Any] = {"use_kl_loss": False, **algorithm}
    policy = PolicyConfig(optimizer_config=OptimizerConfig(lr=1e-2, weight_decay=0.1, scheduler="linear"))
    config = TrainerConfig(algorithm=AlgorithmConfig(**with_defaults), policy=policy, **settings)
    reference = tiny_policy(seed=1) if config.algorithm.use_kl_loss else None
    return TorchLearner(tiny_policy(compute_dtype=dtype), config, num_training_steps=10, reference=reference)


def prepared(learner: TorchLearner, batch: Batch | None = None) -> Batch:
    batch = random_batch() if batch is None else batch
    return add_advantages(learner.add_logprobs(batch), learner.objective.algorithm)


def without_advantages(batch: Batch) -> Batch:
    return replace(batch, advantages=torch.zeros(batch.num_tokens))


def weights_of(learner: TorchLearner) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in learner.policy.weights.items()}


def has_moved(learner: TorchLearner, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(weight, before[name]) for name, weight in learner.policy.weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["regular", "gspo", "clip_cov", "kl_cov", "cispo", "sapo"])
def test_without_advantages_neither_momentum_nor_weight_decay_moves_the_policy(loss, dtype):
    learner = learner_for({"policy_loss_type": loss}, dtype)
    assert learner.update(prepared(learner))[WITHOUT] == 0
    before, schedule = weights_of(learner), learner._optimizer.plain_state()
    metrics = learner.update(without_advantages(prepared(learner)))
    assert (metrics[WITHOUT], metrics["policy/num_skipped_steps"], learner.policy_version) == (1, 0, 1)
    assert not has_moved(learner, before)
    assert learner._optimizer.plain_state() == schedule
    assert metrics["policy/policy_entropy"] > 0  # what a pass measures is still reported


def test_only_the_mini_batches_without_advantages_make_no_step():
    learner = learner_for({}, policy_mini_batch_size=1, update_epochs_per_batch=2)
    batch = prepared(learner)
    assert batch.advantages is not None
    second_group = batch.group_index[batch.sample_index] == 1
    metrics = learner.update(replace(batch, advantages=torch.where(second_group, 0.0, batch.advantages)))
    assert (metrics[WITHOUT], learner.policy_version) == (2, 4)


@pytest.mark.parametrize(
    ("algorithm", "moves"),
    [
        ({"use_kl_loss": True, "kl_loss_coef": 0.1}, True),
        ({"use_kl_loss": True, "kl_loss_coef": 0.0}, False),
        ({"use_entropy_loss": True, "entropy_loss_coef": 0.01}, True),
        ({"use_entropy_loss": True, "entropy_loss_coef": 0.0}, False),
    ],
)
def test_a_term_with_a_weight_is_learned_without_advantages(algorithm, moves):
    learner = learner_for(algorithm)
    before = weights_of(learner)
    metrics = learner.update(without_advantages(prepared(learner)))
    assert metrics[WITHOUT] == (not moves)
    assert has_moved(learner, before) is moves


def towards_every_token(log_probs, advantages):
    return -log_probs + 0.0 * advantages, {}


def test_a_loss_of_the_users_may_learn_without_advantages():
    learner = learner_for({"policy_loss_type": f"{__name__}:towards_every_token"})
    assert learner.update(without_advantages(prepared(learner)))[WITHOUT] == 0
    assert learner.policy_version == 1


def test_a_backward_pass_that_reaches_no_weight_is_an_error():
    """As after an adapter or a kernel that cuts the graph: in bfloat16 the masters' hooks are never called."""
    learner = learner_for({}, torch.bfloat16)
    for parameter in learner.policy.module.parameters():
        parameter.requires_grad_(False)
    module: Any = learner.policy.module
    module.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())
    with pytest.raises(GradientLost, match="exactly zero, but the policy loss has one for"):
        learner.update(prepared(learner))


def test_a_gradient_of_zeros_is_an_error_too():
    learner = learner_for({})
    for parameter in learner.policy.module.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(GradientLost, match="The update would have changed nothing"):
        learner.update(prepared(learner))


def test_where_every_token_is_clipped_a_gradient_of_zero_is_right():
    learner = learner_for({})
    batch = prepared(learner)
    far_below = torch.where(batch.loss_mask, -50.0, 0.0)  # the ratio is above 1 + eps, and every advantage positive
    batch = replace(batch, advantages=torch.ones(batch.num_tokens), old_logprobs=far_below)
    assert learner.update(batch)["policy/grad_norm"] == 0
    assert learner.policy_version == 1


def test_equal_samples_with_opposite_advantages_rightly_cancel():
    learner = learner_for({}, micro_train_batch_size_per_gpu=1)  # one after the other: x + (-x) is exactly 0
    batch = prepared(learner, pack([sample("0011", trajectory="a_0"), sample("0011", trajectory="a_1")]))
    signs = torch.tensor([1.0, -1.0])[batch.sample_index]
    assert learner.update(replace(batch, advantages=signs))["policy/grad_norm"] == 0


def test_a_policy_that_is_sure_of_every_token_has_no_gradient():
    learner = learner_for({})
    module: Any = learner.policy.module
    with torch.no_grad():
        module.get_output_embeddings().weight.zero_()[7] = 1000.0
        module.get_input_embeddings().weight.fill_(1.0)
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    batch = prepared(learner, pack([sample("0011"), sample("0011", trajectory="a_1")]))
    batch = replace(batch, input_ids=torch.full_like(batch.input_ids, 7), advantages=torch.ones(batch.num_tokens))
    assert learner.update(batch)["policy/grad_norm"] == 0
