"""The float32 sums of bfloat16 weights' gradients, whoever adds to them, are close to the true gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skyrl_train.config import OptimizerConfig
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.model import Policy
from tests.skyrl_train.batches import shared_batch
from tests.skyrl_train.learner.test_learner import relative_difference
from tests.tiny_models import tiny_policy
from tests.without_compiler import without_compiler

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def summed_gradient(policy: Policy, passes: int = 1) -> dict[str, Tensor]:
    """Of the logprobs and entropies of a batch, `passes` times."""
    masters = MasterOptimizer(policy.module.named_parameters(), OptimizerConfig(), 10).masters
    batch = shared_batch()
    pull = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(3))
    for _ in range(passes):
        logprobs, entropies = batch_logprobs(policy, batch, temperature=1.3, with_entropy=True)
        (pull * (logprobs + entropies)).sum().backward()
    assert not any(p.grad is not None for p in policy.module.parameters() if p.dtype != torch.float32)
    return {name: master.grad.double() for name, master in masters.items() if master.grad is not None}


def coarse_and_fine(family: str, **config: Any) -> tuple[Policy, Policy]:
    """The same weights in bfloat16 and float32."""
    coarse = tiny_policy(family, compute_dtype=torch.bfloat16, **SIZES, **config)
    fine = tiny_policy(family, **SIZES, **config)
    fine.module.load_state_dict(coarse.module.state_dict())
    return coarse, fine


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True), ("mistral", False)]
)
def test_the_sums_are_as_near_to_the_gradient_as_those_of_plain_torch(family, tied, checkpointing):
    coarse, fine = coarse_and_fine(family, tie_word_embeddings=tied, gradient_checkpointing=checkpointing)
    true_gradient = summed_gradient(fine)
    gradient = summed_gradient(coarse)
    with without_compiler():
        theirs = summed_gradient(coarse_and_fine(family, tie_word_embeddings=tied)[0])
    assert gradient.keys() == true_gradient.keys() == theirs.keys()
    assert relative_difference(gradient, true_gradient) < 1.2 * relative_difference(theirs, true_gradient) < 0.1
    for name, true in true_gradient.items():
        if float(true.norm()) > 1e-3:  # the bias of the keys has no gradient: it moves all scores of a query alike
            distance, their_distance = (
                relative_difference({name: of[name]}, {name: true}) for of in (gradient, theirs)
            )
            assert distance < 1.5 * their_distance + 0.01, name


def test_a_second_pass_adds_to_the_first():
    policy = tiny_policy(compute_dtype=torch.bfloat16, **SIZES)
    once, twice = summed_gradient(policy), summed_gradient(policy, passes=2)
    assert relative_difference({name: 2 * total for name, total in once.items()}, twice) < 1e-5


def test_padding_gets_no_gradient_through_the_embedding():
    policy = tiny_policy(compute_dtype=torch.bfloat16, tie_word_embeddings=False, pad_token_id=7)
    embedding: Any = policy.module.get_input_embeddings()
    master = MasterOptimizer([("weight", embedding.weight)], OptimizerConfig(), 10).masters["weight"]
    embedding(torch.tensor([[7, 8, 8]])).float().sum().backward()
    assert master.grad is not None
    assert master.grad[7].abs().sum() == 0
    assert torch.equal(master.grad[8], torch.full_like(master.grad[8], 2.0))
