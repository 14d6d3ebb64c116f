"""The samples that both sides of update.py train on: groups of equal prompts with responses of random tokens."""

from __future__ import annotations

from random import Random
from typing import Any

from skyrl_train.batch.packing import pack
from skyrl_train.types import Batch, Sample
from tests.benchmarks.workers.prompts import prompts


def batch(tokenizer: Any, settings: dict[str, Any]) -> Batch:
    """Return a batch of `num_prompts` groups of `samples`: a prompt of `prompt_tokens`, a response of `tokens`."""
    random, num_tokens = Random(0), settings["tokens"]
    samples = []
    for group, prompt in enumerate(prompts(tokenizer, settings["num_prompts"], settings["prompt_tokens"])):
        for repetition in range(settings["samples"]):
            response = [random.randrange(len(tokenizer)) for _ in range(num_tokens)]
            samples.append(
                Sample(
                    input_ids=prompt + response,
                    loss_mask=[False] * len(prompt) + [True] * num_tokens,
                    rollout_logprobs=[0.0] * (len(prompt) + num_tokens),
                    rewards=[0.0] * (len(prompt) + num_tokens - 1) + [float(random.randrange(10))],
                    num_prompt_tokens=len(prompt),
                    group_id=str(group),
                    trajectory_id=f"{group}_{repetition}",
                )
            )
    return pack(samples)
