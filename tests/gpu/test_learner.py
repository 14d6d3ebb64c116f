"""The learner on a GPU has the CPU's gradient, a falling loss, and memory within its budget."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.learner.learner import TorchLearner
from tests.skyrl_train.batches import random_batch, shared_batch
from tests.skyrl_train.learner.test_learner import (
    gradients_of,
    learner_for,
    prepared,
    relative_difference,
    trainer_config,
)
from tests.tiny_models import tiny_policy

BATCHES = {"random": random_batch, "shared prefixes": shared_batch}


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_gradient_is_the_processors(
    device: torch.device, family: str, checkpointing: bool, batch_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trainer_config({"kl_loss_coef": 0.1, "use_entropy_loss": True}, max_tokens_per_microbatch=100)
    gradients: list[dict[str, torch.Tensor]] = []
    for place in ("cpu", device):
        policy = tiny_policy(family, device=place, gradient_checkpointing=checkpointing)
        reference = tiny_policy(family, device=place)
        with torch.no_grad():
            for weight in reference.module.parameters():
                weight *= 1.1
        learner = learner_for(config, policy=policy, reference=reference)
        batch = prepared(learner, config, BATCHES[batch_name]())
        found, metrics = gradients_of(config, batch, monkeypatch, policy=policy, reference=reference)
        assert metrics["policy/grad_norm"] > 0
        gradients.append({name: gradient.cpu() for name, gradient in found.items()})
    assert relative_difference(gradients[1], gradients[0]) < 1e-4  # two ways of attending, in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls(device: torch.device, dtype: torch.dtype) -> None:
    config = trainer_config(optimizer={"lr": 3e-3})
    learner = learner_for(config, policy=tiny_policy(compute_dtype=dtype, device=device))
    batch = prepared(learner, config)

    def loss() -> float:
        logprobs = learner._logprobs(learner.policy, batch)
        return -float((logprobs * batch.advantages)[batch.loss_mask].mean())

    before = loss()
    for _ in range(3):
        learner.update(prepared(learner, config))
    assert learner.policy_version == 3
    assert loss() < before - 0.01


def test_deterministic_updates_give_the_same_bits(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results: list[list[torch.Tensor]] = []
        for _ in range(2):
            config = trainer_config({"use_kl_loss": False, "use_entropy_loss": True})
            learner = learner_for(config, policy=tiny_policy("qwen2", device=device))
            learner.update(prepared(learner, config, shared_batch()))
            results.append([weight.detach().cpu() for weight in learner.policy.module.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def peak_bytes(learner: TorchLearner, config: Any, num_prompts: int) -> int:
    batch = random_batch(num_prompts=num_prompts, num_samples=8, max_length=120)
    ready = add_advantages(learner.add_logprobs(batch), config.algorithm)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    learner.update(ready)
    return torch.cuda.max_memory_allocated() - held


def test_peak_memory_grows_with_the_token_budget_and_not_with_the_batch(device: torch.device) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    peaks: dict[tuple[int, int], int] = {}
    for budget in (1000, 4000):
        config = trainer_config(
            train_batch_size=64, policy_mini_batch_size=64, max_tokens_per_microbatch=budget
        )  # one optimizer step
        learner = learner_for(config, policy=tiny_policy("qwen2", device=device, **shape))
        peak_bytes(learner, config, 16)  # the optimizer's own memory is there from now on
        for num_prompts in (16, 64):  # about 8,000 and 32,000 tokens
            peaks[budget, num_prompts] = peak_bytes(learner, config, num_prompts)
        del learner
    assert peaks[1000, 64] < 1.1 * peaks[1000, 16]
    assert peaks[4000, 64] < 1.1 * peaks[4000, 16]
    assert peaks[4000, 16] > 1.5 * peaks[1000, 16]
