"""A prefix that samples share is computed once, and neither logprobs nor gradient can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.batch.prefix_tree import share_prefixes
from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.model import Policy
from skyrl_train.types import Batch
from tests.skyrl_train.batches import shared_batch
from tests.skyrl_train.learner.test_learner import (
    gradients_of,
    learner_for,
    prepared,
    relative_difference,
    trainer_config,
)
from tests.tiny_models import tiny_policy

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 8}),  # a rest sees the end of its prefix only
    ("mistral", {"sliding_window": 50}),  # longer than most rests
]


def logprobs_and_gradient(policy: Policy, batches: list[Batch], pull: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of sum(pull * (logprobs + entropies)), each batch in a pass of its own."""
    policy.module.zero_grad()
    parts, start = [], 0
    for batch in batches:
        logprobs, entropies = batch_logprobs(policy, batch, temperature=1.3, with_entropy=True)
        (pull[start : start + batch.num_tokens] * (logprobs + entropies)).sum().backward()
        parts.append(logprobs.detach())
        start += batch.num_tokens
    return torch.cat(parts), {
        name: p.grad.double() for name, p in policy.module.named_parameters() if p.grad is not None
    }


def one_by_one(batch: Batch) -> list[Batch]:
    return [batch.select([sample]) for sample in range(batch.num_samples)]


def pull_on(batch: Batch) -> Tensor:
    return torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(3))


def test_the_batch_of_these_tests_shares_prompts_and_histories_two_deep():
    batch = shared_batch()
    segments = share_prefixes(batch)
    # (5 - 1) * 40 of the prompt; 3 * 17 of the other prompt, and 30 more of the two samples of one trajectory
    assert batch.num_tokens - len(segments.input_ids) == 160 + 51 + 30
    assert len(segments.before) == 1 + 4 + 1 + (1 + 2) + 2 + 1 + 3  # one sample has no rest
    two_deep = segments.before[segments.before[segments.before >= 0]] >= 0
    assert two_deep.sum() == 2


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_logprobs_and_gradient_are_those_of_the_samples_alone(family, config, gradient_checkpointing):
    batch = shared_batch()
    pull = pull_on(batch)
    policy = tiny_policy(family, gradient_checkpointing=gradient_checkpointing, **config)
    logprobs, gradient = logprobs_and_gradient(policy, [batch], pull)
    expected, expected_gradient = logprobs_and_gradient(tiny_policy(family, **config), one_by_one(batch), pull)
    assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert relative_difference(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("limits", [{"max_tokens_per_microbatch": n} for n in (1, 60, 100, 8192)])
@pytest.mark.parametrize("loss", ["regular", "gspo"])
def test_an_update_does_not_see_how_the_sharing_was_cut(loss, limits, monkeypatch):
    algorithm = {"policy_loss_type": loss, "kl_loss_coef": 0.1, "use_entropy_loss": True}
    alone = trainer_config(algorithm, micro_train_batch_size_per_gpu=1, train_batch_size=4, policy_mini_batch_size=4)
    shared = trainer_config(algorithm, **limits, train_batch_size=4, policy_mini_batch_size=4)
    reference = tiny_policy(seed=1)
    batch = prepared(learner_for(alone, reference=reference), alone, shared_batch())
    expected, expected_metrics = gradients_of(alone, batch, monkeypatch, reference=reference)
    gradients, metrics = gradients_of(shared, batch, monkeypatch, reference=reference)
    assert relative_difference(gradients, expected) < 1e-5
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_in_bfloat16_sharing_is_no_further_from_the_true_gradient():
    batch = shared_batch()
    pull = pull_on(batch)
    coarse = tiny_policy(compute_dtype=torch.bfloat16)
    fine = tiny_policy()
    fine.module.load_state_dict(coarse.module.state_dict())
    _, true_gradient = logprobs_and_gradient(fine, one_by_one(batch), pull)
    _, shared = logprobs_and_gradient(coarse, [batch], pull)
    _, alone = logprobs_and_gradient(coarse, one_by_one(batch), pull)
    error, error_alone = (relative_difference(gradient, true_gradient) for gradient in (shared, alone))
    assert error < 1.1 * error_alone
