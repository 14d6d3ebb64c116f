"""Many episodes at once: groups with one seed, retries after environment failures, and a report when nothing moves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loguru import logger

import skyrl_gym
from skyrl_gym.core import EnvFailure
from skyrl_train.engine.base import Engine, SamplingParams
from skyrl_train.rollout.attempts import Attempts
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.env_calls import BrokenEnv, EnvCalls
from skyrl_train.rollout.episode import Cut, Episode, EpisodeLimits, EpisodeTask
from skyrl_train.rollout.failures import Failures
from skyrl_train.rollout.lockstep import Lockstep
from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.spans import episode_lane
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory

OnEpisode = Callable[[Trajectory], None]
STALL_REPORT_S = 60.0


@dataclass(frozen=True, slots=True)
class Round:
    """What is asked of the collector: these prompts, so many episodes each."""

    phase: str  # "train" or "eval"; part of every seed
    step: int
    prompts: list[Prompt]
    samples_per_prompt: int
    sampling: SamplingParams
    reproducible: bool = False  # episodes take their turns together, so that the engine computes the same each time

    @property
    def num_episodes(self) -> int:
        return len(self.prompts) * self.samples_per_prompt


class EveryEpisodeFailed(RuntimeError):
    """No episode of a round survived its retries: something is wrong with the environment itself."""


class Collector:
    """Plays rounds of episodes against one engine. One for the whole run."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        limits: EpisodeLimits,
        *,
        env_configs: Mapping[str, Any] | Callable[[str], Any],
        max_env_workers: int = 32,
        max_retries: int = 2,
        seed: int = 42,
        deterministic: bool = False,
    ) -> None:
        self.engine = engine
        self.template = template
        self.limits = limits
        self.max_retries = max_retries
        self.seed = seed
        self.deterministic = deterministic
        self._env_config = env_configs if callable(env_configs) else lambda env_id: env_configs.get(env_id, {})
        self._executor = ThreadPoolExecutor(max(1, max_env_workers), thread_name_prefix="environment")
        self._playing: dict[str, Episode] = {}
        self._failures = Failures()
        self._last_end = time.monotonic()
        self._cuts: Counter[Cut] = Counter()  # of the round that is being played
        self._told: set[Cut] = set()

    async def collect(self, asked: Round, on_episode: OnEpisode | None = None) -> list[Group]:
        """All episodes of the round, in the order of its prompts. Failed episodes are in it, typed ENV_FAILURE."""
        tasks = [self._task(asked, prompt, i) for prompt in asked.prompts for i in range(asked.samples_per_prompt)]
        lockstep = Lockstep(len(tasks)) if self.deterministic or asked.reproducible else None
        self._last_end, self._failures = time.monotonic(), Failures()
        self._cuts.clear()
        stall_report = asyncio.create_task(self._report_stalls())
        try:
            async with asyncio.TaskGroup() as playing:
                episodes = [playing.create_task(self._play(task, lockstep, on_episode)) for task in tasks]
        finally:
            stall_report.cancel()
            self._failures.say_how_many()
        trajectories = [episode.result() for episode in episodes]
        refuse_if_all_failed(trajectories, self._failures)
        self._tell_of_cuts(len(trajectories))
        n = asked.samples_per_prompt
        return [Group(prompt, trajectories[i * n : (i + 1) * n]) for i, prompt in enumerate(asked.prompts)]

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _task(self, asked: Round, prompt: Prompt, repetition: int) -> EpisodeTask:
        where = (self.seed, asked.phase, asked.step, prompt.uid)
        return EpisodeTask(
            prompt=prompt,
            repetition=repetition,
            env_seed=derive_seed("environment", *where) % 2**31,  # as wide as the engines behind environments take
            sampling=asked.sampling,
            sampling_seed=derive_seed("sampling", *where, repetition),
        )

    async def _play(self, task: EpisodeTask, lockstep: Lockstep | None, on_episode: OnEpisode | None) -> Trajectory:
        try:
            with episode_lane("episode", id=task.id):
                trajectory = await self._play_with_retries(task, lockstep)
        finally:
            self._playing.pop(task.id, None)
            self._last_end = time.monotonic()
            if lockstep is not None:
                lockstep.leave(task.id)
        if on_episode is not None:
            on_episode(trajectory)
        return trajectory

    async def _play_with_retries(self, task: EpisodeTask, lockstep: Lockstep | None) -> Trajectory:
        failure, attempts, pause_s = "", Attempts(self.max_retries), 0.0
        while pause_s is not None:
            await asyncio.sleep(pause_s)
            episode = self._episode(task, lockstep, attempts.num - 1)
            self._playing[task.id] = episode
            try:
                trajectory = await episode.play()
                if episode.cut is not None:
                    self._cuts[episode.cut] += 1
                return trajectory
            except EnvFailure as error:
                repeats, failure = _repeats_itself(error, failure), str(error)
                pause_s = None if repeats else attempts.pause_s(error)
                what_now = "it is not played again" if pause_s is None else f"it is played again in {pause_s:g} s"
                self._failures.add(task.id, failure, what_now)
        return Trajectory(
            prompt=task.prompt,
            repetition=task.repetition,
            seed=episode.env.seed,
            messages=episode.messages or task.prompt.messages,
            turns=episode.turns,
            end=EpisodeEnd.ENV_FAILURE,
            num_attempts=attempts.num,
            failure=failure,
        )

    def _episode(self, task: EpisodeTask, lockstep: Lockstep | None, attempt: int) -> Episode:
        env = EnvCalls(self._make_env, task, self.limits, self._executor)
        return Episode(task, self.engine, self.template, self.limits, env, lockstep, attempt)

    def _make_env(self, env_class: str, extras: dict[str, Any]) -> Any:
        return skyrl_gym.make(env_class, env_config=self._env_config(env_class), extras=extras)

    async def _report_stalls(self) -> None:
        while True:
            await asyncio.sleep(STALL_REPORT_S)
            idle_s = time.monotonic() - self._last_end
            if idle_s >= STALL_REPORT_S and self._playing:
                logger.warning(f"no episode ended for {idle_s:.0f} s; {self.who_waits_for_what()}")

    def _tell_of_cuts(self, num_episodes: int) -> None:
        """Warn once of each limit of the run that ended episodes before their environment said done."""
        for cut in self._cuts.keys() - self._told:
            self._told.add(cut)
            if cut is Cut.TURNS:
                where = "at the turn limit (generator.max_turns, or the row's own max_turns)"
                do = "raise it, or set no limit (generator.max_turns=null) so that the environment's done decides"
            else:
                where = f"because their history was longer than {self._longest_input} tokens"
                do = "raise generator.max_input_length, or take a model with a longer context"
            share = f"{self._cuts[cut]} of {num_episodes} episodes ({self._cuts[cut] / num_episodes:.0%})"
            logger.warning(f"{share} of this round were cut {where} before the environment was done; {do}")

    @property
    def _longest_input(self) -> int:
        return min(self.limits.max_input_length, self.limits.max_context - 1)

    def who_waits_for_what(self) -> str:
        waits: dict[str, list[str]] = {}
        for episode_id, episode in self._playing.items():
            waits.setdefault(episode.waits_for, []).append(episode_id)
        shown = [f"{len(ids)} wait for {what} ({', '.join(ids[:4])}…)" for what, ids in sorted(waits.items())]
        return "; ".join(shown) or "no episode is being played"


def _repeats_itself(error: EnvFailure, failure: str) -> bool:
    """Whether playing the episode again would meet the same mistake. failure: the words of the one before."""
    return isinstance(error, BrokenEnv) and (error.is_mistake or str(error) == failure)


def refuse_if_all_failed(trajectories: list[Trajectory], failures: Failures | None = None) -> None:
    """failures: of all attempts, where they were counted; else the last one of each episode counts."""
    if trajectories and all(trajectory.end is EpisodeEnd.ENV_FAILURE for trajectory in trajectories):
        words, count = (failures or Failures.of(trajectory.failure or "" for trajectory in trajectories)).commonest()
        num_attempts = sum(trajectory.num_attempts for trajectory in trajectories)
        raise EveryEpisodeFailed(
            f"all {len(trajectories)} episodes of a round failed in their environments, in {num_attempts} attempts. "
            f"{count} of these failed like this:\n{' '.join(words.split())}"
        )
