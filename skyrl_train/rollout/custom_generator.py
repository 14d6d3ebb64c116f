"""A generator of the user's in the place of our collector: rounds go in, its output comes back as groups."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from loguru import logger

from skyrl_train.generators.base import BatchMetadata, GeneratorInput, GeneratorInterface, TrajectoryID
from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
from skyrl_train.inference_engines.utils import sampling_dict
from skyrl_train.rollout.collector import OnEpisode, Round, refuse_if_all_failed
from skyrl_train.rollout.generator_output import WrongOutput, check_output, groups_of
from skyrl_train.types import Group


class GeneratorCollector:
    """Has a generator play each round. `metrics` are the rollout_metrics of the last training round."""

    def __init__(
        self, generator: GeneratorInterface, client: InferenceEngineClient, *, needs_logprobs: bool = False
    ) -> None:
        self.generator, self.client, self.needs_logprobs = generator, client, needs_logprobs
        self.metrics: dict[str, float] = {}

    async def collect(self, asked: Round, on_episode: OnEpisode | None = None) -> list[Group]:
        """All episodes of the round, in the order of its prompts. WrongOutput if the generator's output is no round."""
        self.client.begin_round((asked.phase, asked.step), asked.sampling)
        try:
            answer = self.generator.generate(_input_of(asked))
            output = await answer if inspect.isawaitable(answer) else answer
        finally:
            await self.client.end_round()
        check_output(output, asked.num_episodes)
        if self.needs_logprobs and output.get("rollout_logprobs") is None:
            raise WrongOutput(
                "trainer.algorithm.off_policy_correction compares with rollout_logprobs, and the generator returned "
                "none; return those of the engine's response_logprobs, or turn the correction off"
            )
        if not any(any(mask) for mask in output["loss_masks"]):
            logger.warning("every loss mask that the generator returned is 0: nothing of this round is trained")
        groups = groups_of(
            output, asked.prompts, asked.samples_per_prompt, self.client.tokenizer, self.client.policy_version
        )
        refuse_if_all_failed([trajectory for group in groups for trajectory in group.trajectories])
        if asked.phase == "train":
            self.metrics = _numbers(output.get("rollout_metrics") or {})
        for group in groups:
            for trajectory in group.trajectories:
                if on_episode is not None:
                    on_episode(trajectory)
        return groups

    def close(self) -> None:
        close: Callable[[], Any] | None = getattr(self.generator, "close", None)
        if close is not None and not inspect.iscoroutinefunction(close):
            close()


def _input_of(asked: Round) -> GeneratorInput:
    """Each prompt `samples_per_prompt` times in a row; every episode has copies of its own."""
    episodes = [(prompt, i) for prompt in asked.prompts for i in range(asked.samples_per_prompt)]
    return {
        "prompts": [copy.deepcopy(prompt.messages) for prompt, _ in episodes],
        "env_classes": [prompt.env_class for prompt, _ in episodes],
        "env_extras": [copy.deepcopy(prompt.env_extras) for prompt, _ in episodes],
        "sampling_params": sampling_dict(asked.sampling),
        "trajectory_ids": [TrajectoryID(prompt.uid, i) for prompt, i in episodes],
        "batch_metadata": BatchMetadata(asked.step, "eval" if asked.phase == "eval" else "train"),
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in metrics.items() if isinstance(value, int | float)}
