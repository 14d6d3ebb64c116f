"""Updates on the processor and on a pretended device: one JSON line with how far apart the weights are afterwards."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tests.pretend_device import OnDevice, PretendDevice
from tests.skyrl_train.batches import random_batch, shared_batch
from tests.skyrl_train.learner.test_learner import learner_for, prepared, relative_difference, trainer_config
from tests.tiny_models import tiny_policy

LOSSES: dict[str, dict[str, Any]] = {
    "qwen2": {"kl_loss_coef": 0.1, "use_entropy_loss": True},
    "llama": {"policy_loss_type": "gspo", "use_kl_loss": False},
    "qwen3": {"policy_loss_type": "clip_cov", "use_kl_loss": False, "use_kl_in_reward": True},
}


def updates(family: str, algorithm: dict[str, Any], batch: Any, place: str) -> dict[str, Tensor]:
    """What an update adds to the weights."""
    config = trainer_config(algorithm, {"lr": 1e-2, "weight_decay": 0.0}, max_tokens_per_microbatch=100)
    policy, reference = (tiny_policy(family, seed=seed, device=place) for seed in (0, 1))
    before = {name: _host(weight).clone() for name, weight in policy.module.named_parameters()}
    learner = learner_for(config, policy=policy, reference=reference)
    metrics = learner.update(prepared(learner, config, batch))
    assert metrics["policy/num_skipped_steps"] == 0
    return {name: _host(weight) - before[name] for name, weight in policy.module.named_parameters()}


def _host(weight: Tensor) -> Tensor:
    return weight.host if isinstance(weight, OnDevice) else weight.detach()


def main() -> None:
    torch.set_num_threads(1)
    distances = {}
    with PretendDevice():
        for family, algorithm in LOSSES.items():
            for batch in (random_batch(), shared_batch()):
                ours, theirs = (updates(family, algorithm, batch, place) for place in ("pretend", "cpu"))
                distances[f"{family}, {batch.num_tokens} tokens"] = relative_difference(ours, theirs)
    print(json.dumps(distances))


if __name__ == "__main__":
    main()
