"""Many episodes at once: groups with one seed, retries after environment failures, and a report when nothing moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from random import Random
from typing import Any

from loguru import logger

import skyrl_gym
from skyrl_gym.core import EnvFailure
from skyrl_train.engine.base import Engine, engine_death
from skyrl_train.rollout.agents.endpoint import Endpoint
from skyrl_train.rollout.agents.episode import Agent, AgentEpisode
from skyrl_train.rollout.attempts import Attempts
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.env_calls import BrokenEnv, EnvCalls
from skyrl_train.rollout.episode import Cut, Episode, EpisodeLimits, EpisodeTask
from skyrl_train.rollout.failures import Failures
from skyrl_train.rollout.garbage import rare_collections
from skyrl_train.rollout.playing import Playing
from skyrl_train.rollout.rewards import Rewards
from skyrl_train.rollout.round import EveryEpisodeFailed, OnEpisode, Round
from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.spans import episode_lane
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory


class Collector:
    """Plays rounds of episodes against one engine. One for the whole run; several rounds may be under way at once."""

    metrics: Mapping[str, float] = {}

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
        agent: tuple[Agent, Endpoint] | None = None,
        rewards: Rewards | None = None,
    ) -> None:
        """agent: what plays the episodes in the place of environments, and where its calls are answered.

        rewards: what pays the turns, where that is not the environments alone.
        """
        self.engine = engine
        self.template = template
        self.limits = limits
        self.max_retries = max_retries
        self.seed = seed
        self.deterministic = deterministic
        self.agent = agent
        self.rewards = rewards
        self._env_config = env_configs if callable(env_configs) else lambda env_id: env_configs.get(env_id, {})
        self._executor = ThreadPoolExecutor(max(1, max_env_workers), thread_name_prefix="environment")
        self._told: set[Cut] = set()

    async def collect(self, this_round: Round, on_episode: OnEpisode | None = None) -> list[Group]:
        """Return all groups in the order of the prompts. Failed episodes are in them, typed ENV_FAILURE."""
        place = {id(prompt): i for i, prompt in enumerate(this_round.prompts)}
        async with aclosing(self.groups(this_round, on_episode)) as groups:
            return sorted([group async for group in groups], key=lambda group: place[id(group.prompt)])

    async def groups(self, this_round: Round, on_episode: OnEpisode | None = None) -> AsyncGenerator[Group]:
        """Yield each group when its last episode has ended.

        Raises what an episode raises that is no environment failure, EngineDied for one, and EveryEpisodeFailed after
        the last group. However it ends, every episode has ended then and every environment is closed.
        """
        playing = Playing(this_round, in_lockstep=self.deterministic or this_round.reproducible)
        ended: asyncio.Queue[asyncio.Task[Trajectory]] = asyncio.Queue()
        place: dict[asyncio.Task[Trajectory], int] = {}  # of an episode's prompt in the round
        found: list[list[Trajectory]] = [[] for _ in this_round.prompts]
        with rare_collections(this_round.num_episodes):
            for i, prompt in enumerate(this_round.prompts):
                for repetition in range(this_round.samples_per_prompt):
                    task = self._task(this_round, prompt, repetition)
                    place[episode := asyncio.create_task(self._play(task, playing, on_episode))] = i
                    episode.add_done_callback(ended.put_nowait)
            stall_report = asyncio.create_task(playing.report_stalls())
            try:
                for _ in range(this_round.num_episodes):
                    episode = await ended.get()
                    found[i := place[episode]].append(episode.result())
                    if len(found[i]) == this_round.samples_per_prompt:
                        yield Group(
                            this_round.prompts[i], sorted(found[i], key=lambda trajectory: trajectory.repetition)
                        )
            finally:
                stall_report.cancel()
                await _cancelled(place)
                playing.failures.say_how_many()
                if playing.lockstep is not None and playing.failures.counts:
                    logger.warning(
                        f"{this_round.name}: episodes failed, so fewer than usual took some turns together: with the "
                        "same weights, rounding may give other rewards the next time"
                    )
        refuse_if_all_failed([trajectory for group in found for trajectory in group])
        self._tell_of_cuts(playing)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _task(self, this_round: Round, prompt: Prompt, repetition: int) -> EpisodeTask:
        where = (self.seed, this_round.phase, this_round.step, prompt.uid)
        return EpisodeTask(
            prompt=prompt,
            repetition=repetition,
            env_seed=derive_seed("environment", *where) % 2**31,  # as wide as the engines behind environments take
            sampling=this_round.sampling,
            sampling_seed=derive_seed("sampling", *where, repetition),
            round_name=this_round.name,
        )

    async def _play(self, task: EpisodeTask, playing: Playing, on_episode: OnEpisode | None) -> Trajectory:
        try:
            with episode_lane("episode", id=task.id):
                trajectory = await self._play_with_retries(task, playing)
        finally:
            playing.ends(task.id)
        if on_episode is not None:
            on_episode(trajectory)
        return trajectory

    async def _play_with_retries(self, task: EpisodeTask, playing: Playing) -> Trajectory:
        failure, attempts, pause_s = "", Attempts(self.max_retries, Random(task.sampling_seed)), 0.0
        while pause_s is not None:
            await asyncio.sleep(pause_s)
            episode = self._episode(task, playing, attempts.num - 1)
            playing.begins(episode)
            try:
                trajectory = await episode.play()
                if episode.cut is not None:
                    playing.cuts[episode.cut] += 1
                return trajectory
            except EnvFailure as error:
                if (death := engine_death(error)) is not None:
                    raise death from death.__cause__  # the environment asked the engine, and did not break itself
                repeats, failure = _repeats_itself(error, failure), str(error)
                pause_s = None if repeats else attempts.pause_s(error)
                what_now = "it is not played again" if pause_s is None else f"it is played again in {pause_s:.1f} s"
                playing.failures.add(task.id, failure, what_now)
        return Trajectory(
            prompt=task.prompt,
            repetition=task.repetition,
            seed=episode.seed,
            messages=episode.messages or task.prompt.messages,
            turns=episode.turns,
            end=EpisodeEnd.ENV_FAILURE,
            num_attempts=attempts.num,
            failure=failure,
        )

    def _episode(self, task: EpisodeTask, playing: Playing, attempt: int) -> Episode | AgentEpisode:
        if self.agent is not None:
            agent, endpoint = self.agent
            return AgentEpisode(task, agent, endpoint, self.limits, self._executor, attempt, rewards=self.rewards)
        env = EnvCalls(self._make_env, task, self.limits, self._executor, self.rewards)
        return Episode(task, self.engine, self.template, self.limits, env, playing.lockstep, attempt)

    def _make_env(self, env_class: str, extras: dict[str, Any]) -> Any:
        return skyrl_gym.make(env_class, env_config=self._env_config(env_class), extras=extras)

    def _tell_of_cuts(self, playing: Playing) -> None:
        """Warn once of each limit of the run that ended episodes before their environment said done."""
        num_episodes = playing.round.num_episodes
        for cut in playing.cuts.keys() - self._told:
            self._told.add(cut)
            if cut is Cut.TURNS:
                where = "at the turn limit (generator.max_turns, or the row's own max_turns)"
                do = "raise it, or set no limit (generator.max_turns=null) so that the environment's done decides"
            else:
                where = f"because their history was longer than {self._longest_input} tokens"
                do = "raise generator.max_input_length, or take a model with a longer context"
            share = f"{playing.cuts[cut]} of {num_episodes} episodes ({playing.cuts[cut] / num_episodes:.0%})"
            logger.warning(f"{share} of this round were cut {where} before the environment was done; {do}")

    @property
    def _longest_input(self) -> int:
        return min(self.limits.max_input_length, self.limits.max_context - 1)


def _repeats_itself(error: EnvFailure, failure: str) -> bool:
    """Return whether the episode would fail again in the same way. failure: the words of the one before."""
    return isinstance(error, BrokenEnv) and (error.is_mistake or str(error) == failure)


async def _cancelled(episodes: Mapping[asyncio.Task[Trajectory], int]) -> None:
    """Cancel the episodes that are still being played, and wait until their environments are closed."""
    for episode in episodes:
        episode.cancel()
    await asyncio.gather(*episodes, return_exceptions=True)


def refuse_if_all_failed(trajectories: list[Trajectory]) -> None:
    """Raise EveryEpisodeFailed if no episode of a round is left, with the failure that ended most of them."""
    if trajectories and all(trajectory.end is EpisodeEnd.ENV_FAILURE for trajectory in trajectories):
        words, count = Failures.of(trajectory.failure or "" for trajectory in trajectories).commonest()
        num_attempts = sum(trajectory.num_attempts for trajectory in trajectories)
        raise EveryEpisodeFailed(
            f"all {len(trajectories)} episodes of a round failed in their environments, in {num_attempts} attempts. "
            f"{count} of the episodes ended like this:\n{' '.join(words.split())}"
        )
