"""Evaluation: the same weights earn the same, bit for bit, by default, whatever time the environments take."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skyrl_gym.envs import register
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.registration import deregister
from skyrl_train.engine.base import SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import Prompt, Trajectory
from tests.tiny_models import tiny_policy, tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=4, max_input_length=400, max_context=512, step_timeout_s=60, episode_timeout_s=300)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


class SlowEnv(BaseTextEnv):
    """Takes a random while for each answer, of a length that follows from the reply; ends after three or four turns."""

    is_async = True

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.last = 2 + int(extras["number"]) % 2

    async def init_async(self, prompt: Any) -> Any:
        await asyncio.sleep(0.02 * random.random())
        return prompt, {}

    async def step_async(self, action: str) -> BaseTextEnvStepOutput:
        await asyncio.sleep(0.02 * random.random())
        self.turns += 1
        said = [{"role": "user", "content": "more " * (len(action) % 5)}]
        return {"observations": said, "reward": float(len(action)), "done": self.turns > self.last, "metadata": {}}

    async def close_async(self) -> None:
        await asyncio.sleep(0.02 * random.random())


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    register("slow", SlowEnv)
    yield
    deregister("slow")


async def played(collector: Collector, phase: str, **options: Any) -> list[Trajectory]:
    messages = [{"role": "user", "content": "task " * 28}]
    prompts = [
        Prompt(str(i), [*messages, {"role": "user", "content": "x" * i}], "slow", {"number": i}) for i in range(4)
    ]
    groups = await collector.collect(Round(phase, 0, prompts, 2, GREEDY, **options))
    return [trajectory for group in groups for trajectory in group.trajectories]


def exact(trajectories: list[Trajectory]) -> list[tuple[list[int], list[float]]]:
    return [(turn.response_ids, turn.logprobs) for trajectory in trajectories for turn in trajectory.turns]


async def test_five_evaluations_of_the_same_weights_give_the_same_bits_between_rollouts_of_training() -> None:
    policy = tiny_policy(compute_dtype=torch.bfloat16)  # rounding shows any change of what is computed together
    engine = TorchEngine(policy, tiny_tokenizer(), max_num_seqs=5, max_num_batched_tokens=300)
    collector = Collector(engine, ChatTemplate(tiny_tokenizer()), LIMITS, env_configs={})
    try:
        evaluations = []
        for _ in range(5):
            evaluations.append(exact(await played(collector, "eval", reproducible=True)))
            await played(collector, "train")
        reused = engine.stats().tokens_reused
    finally:
        collector.close()
        await engine.close()
    assert len(evaluations[0]) == 8 * 3 + 4
    assert all(evaluation == evaluations[0] for evaluation in evaluations)
    assert reused > 0
