"""A generator of the user's in the place of our collector: rounds go in, its output comes back as groups."""

from __future__ import annotations

import copy
import inspect
from collections.abc import AsyncGenerator, Callable
from typing import Any

from loguru import logger

from skyrl_train.generators.base import BatchMetadata, GeneratorInput, GeneratorInterface, TrajectoryID
from skyrl_train.generators.generator_output import WrongOutput, check_output, groups_of, plain_output, repeats_rewards
from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
from skyrl_train.inference_engines.utils import sampling_dict
from skyrl_train.rollout.collector import refuse_if_all_failed
from skyrl_train.rollout.round import OnEpisode, Round
from skyrl_train.types import Group


class GeneratorCollector:
    """Has a generator play each round. `metrics` are the rollout_metrics of the last training round."""

    def __init__(
        self, generator: GeneratorInterface, client: InferenceEngineClient, *, needs_logprobs: bool = False
    ) -> None:
        self.generator, self.client, self.needs_logprobs = generator, client, needs_logprobs
        self.metrics: dict[str, float] = {}
        self._has_told = False

    async def groups(self, this_round: Round, on_episode: OnEpisode | None = None) -> AsyncGenerator[Group]:
        """Yield the groups of the round in the order of its prompts, all when the generator has returned."""
        for group in await self.collect(this_round, on_episode):
            yield group

    async def collect(self, this_round: Round, on_episode: OnEpisode | None = None) -> list[Group]:
        """Return all groups in the order of the prompts. WrongOutput if the generator's output is no round.

        Raises EngineDied if the engine died meanwhile, whatever the generator made of it.
        """
        playing = self.client.begin_round(this_round)
        try:
            answer = self.generator.generate(_input_of(this_round))
            output = plain_output(await answer if inspect.isawaitable(answer) else answer)
        except Exception:
            playing.refuse_dead_engine()
            raise
        finally:
            await self.client.end_round(playing)
        playing.refuse_dead_engine()
        check_output(output, this_round.num_episodes)
        if self.needs_logprobs and output.get("rollout_logprobs") is None:
            raise WrongOutput(
                "trainer.algorithm.off_policy_correction and the losses dppo and rollout_is compare with "
                "rollout_logprobs, and the generator returned none; return those of the engine's response_logprobs, "
                "or turn the correction off and take another loss"
            )
        if not any(any(mask) for mask in output["loss_masks"]):
            logger.warning("every loss mask that the generator returned is 0: nothing of this round is trained")
        if repeats_rewards(output) and not self._has_told:
            self._has_told = True
            logger.warning(
                "every turn of an episode has the reward of its last step. SkyRL reads only that one; here the rewards "
                "of an episode's turns are added up. If they mean the whole episode, pay 0 for all turns but the last"
            )
        groups = groups_of(
            output, this_round.prompts, this_round.samples_per_prompt, self.client.tokenizer, self.client.policy_version
        )
        refuse_if_all_failed([trajectory for group in groups for trajectory in group.trajectories])
        if this_round.phase == "train":
            self.metrics = _numbers(output.get("rollout_metrics") or {})
        for group in groups:
            for trajectory in group.trajectories:
                if on_episode is not None:
                    on_episode(trajectory)
        return groups

    def close(self) -> None:
        close: Callable[[], Any] | None = getattr(self.generator, "close", None)
        if close is not None:
            close()


def _input_of(this_round: Round) -> GeneratorInput:
    """Return each prompt `samples_per_prompt` times in a row; every episode has copies of its own."""
    episodes = [(prompt, i) for prompt in this_round.prompts for i in range(this_round.samples_per_prompt)]
    return {
        "prompts": [copy.deepcopy(getattr(prompt, "given", prompt.messages)) for prompt, _ in episodes],
        "env_classes": [prompt.env_class for prompt, _ in episodes],
        "env_extras": [copy.deepcopy(prompt.env_extras) for prompt, _ in episodes],
        "sampling_params": sampling_dict(this_round.sampling),
        "trajectory_ids": [TrajectoryID(prompt.uid, i) for prompt, i in episodes],
        "batch_metadata": BatchMetadata(this_round.step, "eval" if this_round.phase == "eval" else "train"),
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in metrics.items() if isinstance(value, int | float)}
