"""An episode that an agent of the user's plays with a client of its own: its calls are recorded at the endpoint."""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from skyrl_gym.contract import Outcome, checked_metrics, checked_pay
from skyrl_gym.core import EnvFailure
from skyrl_train.rollout.agents.endpoint import Endpoint
from skyrl_train.rollout.agents.session import AgentSession, SessionLimits
from skyrl_train.rollout.env_calls import failure
from skyrl_train.rollout.episode import Cut
from skyrl_train.rollout.rewards import Rewards
from skyrl_train.rollout.task import EpisodeLimits, EpisodeTask
from skyrl_train.types import EpisodeEnd, Message, Trajectory, Turn
from skyrl_train.users_functions import CalledByName, imported_function

USED_UP = object()  # in the place of what an agent returns that broke on a refused call
OFFERED = ("prompt", "extras", "base_url", "api_key", "model", "seed")


class Agent:
    """A function of the user's that plays an episode and returns its reward.

    It is called with those of these that it names: `prompt` (the row's messages), `extras` (its other columns),
    `base_url`, `api_key` and `model` for the client, and `seed`. It returns the reward, or a dictionary with `reward`
    and `metrics`. A function that is not async runs in a thread.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """ValueError if the function cannot be called, or needs anything that is not offered."""
        label = f"generator.agent={name}"
        if inspect.isclass(function):
            raise ValueError(f"{label} is a class; name a function, or an object of it that can be called")
        self.name, self._call = name, CalledByName(function, label)
        if unknown := [name for name in self._call.needed if name not in OFFERED]:
            raise ValueError(f"{label} needs {', '.join(unknown)}; offered are {', '.join(OFFERED)}")

    @classmethod
    def named(cls, name: str) -> Agent:
        """Return the agent that `package.module:function` names. ValueError if there is none."""
        return cls(name, imported_function(name, f"generator.agent={name}"))

    async def play(self, offered: dict[str, Any], executor: Executor) -> Outcome:
        """Return the outcome of the function. SystemExit and StopIteration are kept from the event loop."""
        call = partial(self._call, offered)
        if self._call.is_async:
            return await _awaited(call())
        outcome = await asyncio.get_running_loop().run_in_executor(executor, partial(Outcome.of, call))
        return await _awaited(outcome.value) if inspect.isawaitable(outcome.value) else outcome


@dataclass
class AgentEpisode:
    """Has the agent play one EpisodeTask once. `waits_for` says at any moment what the episode waits for."""

    task: EpisodeTask
    agent: Agent
    endpoint: Endpoint
    limits: EpisodeLimits
    executor: Executor
    attempt: int = 0
    waits_for: str = "the agent"
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    cut: Cut | None = None
    rewards: Rewards | None = None  # the weights of what the agent pays by name

    def __post_init__(self) -> None:
        self._extras = copy.deepcopy(self.task.prompt.env_extras)
        own_limit, own_seed = self._extras.pop("max_turns", None), self._extras.pop("seed", None)
        self._max_calls = self.limits.max_turns if own_limit is None else int(own_limit)
        self.seed = self.task.env_seed if own_seed is None else int(own_seed)

    async def play(self) -> Trajectory:
        """Return the episode. EnvFailure if the agent failed, or never asked; EngineDied if the engine did."""
        started = time.monotonic()
        session = self._session()
        base_url = self.endpoint.open(session)
        try:
            answer = await self._answer(base_url)
        except EnvFailure:
            if session.cut is None or not session.calls:
                raise
            answer = (
                USED_UP  # the agent broke on the refusal of a call too many: the policy used up its turns or tokens
            )
        finally:
            self.messages = next((call.messages for call in session.calls), [])
            await self.endpoint.close_session(base_url)
            if session.death is not None:  # whatever the agent made of it
                raise session.death from session.death.__cause__
        reward, rewards, metrics = self._paid(answer)
        if not session.calls:
            raise EnvFailure(f"{self.agent.name}: it returned without a single call of {base_url}")
        *before, last = session.turns(reward)
        self.turns, self.cut = [*before, replace(last, rewards=rewards)], session.cut
        return Trajectory(
            prompt=self.task.prompt,
            repetition=self.task.repetition,
            seed=self.seed,
            messages=self.messages,
            turns=self.turns,
            end=_end(session),
            env_metrics=metrics,
            num_attempts=self.attempt + 1,
            seconds=time.monotonic() - started,
        )

    def _session(self) -> AgentSession:
        limits = SessionLimits(self._max_calls, self.limits.max_input_length, self.limits.max_context)
        session_id = f"{self.task.round_name}_{self.task.id}_{self.attempt}"
        return AgentSession(session_id, self.endpoint.template, self.task.sampling, limits, self.task.sampling_seed)

    def _paid(self, answer: Any) -> tuple[float, dict[str, float], dict[str, Any]]:
        """Return reward, rewards by name and metrics of what the agent returned. EnvFailure if it is none of these.

        An agent whose episode was cut (USED_UP) has earned 0 under every name.
        """
        named = self.rewards.weights if self.rewards else {}
        if answer is USED_UP:
            return 0.0, dict.fromkeys(named, 0.0), {}
        outcome = Outcome.of(lambda: self._read(answer))
        if outcome.error is not None:
            raise failure(outcome.error, self.agent.name, "the agent") from outcome.error
        return outcome.value

    def _read(self, answer: Any) -> tuple[float, dict[str, float], dict[str, Any]]:
        reward, metrics = (
            (answer.get("reward"), answer.get("metrics", {})) if isinstance(answer, dict) else (answer, {})
        )
        return *self._counted(*checked_pay(reward)), checked_metrics(metrics)

    def _counted(self, total: float, parts: dict[str, float]) -> tuple[float, dict[str, float]]:
        if self.rewards is None:
            return total, parts
        paid = self.rewards.of_environment(total, parts)
        self.rewards.check_paid(paid)
        return self.rewards.weighted(paid), paid

    async def _answer(self, base_url: str) -> Any:
        offered = {
            "prompt": copy.deepcopy(self.task.prompt.messages),
            "extras": self._extras,
            "base_url": base_url,
            "api_key": self.endpoint.api_key,
            "model": self.endpoint.model,
            "seed": self.seed,
        }
        seconds = self.limits.episode_timeout_s
        playing = asyncio.create_task(self.agent.play(offered, self.executor))
        try:
            is_in_time, _ = await asyncio.wait({playing}, timeout=seconds)
        finally:
            playing.cancel()
            [outcome] = await asyncio.gather(playing, return_exceptions=True)
        if not is_in_time:
            raise EnvFailure(f"{self.agent.name}: it took longer than {seconds:g} s (generator.episode_timeout_s)")
        if isinstance(outcome, BaseException):
            raise failure(outcome, self.agent.name, "the agent") from outcome
        if outcome.error is not None:
            raise failure(outcome.error, self.agent.name, "the agent") from outcome.error
        return outcome.value


async def _awaited(answer: Awaitable[Any]) -> Outcome:
    with Outcome() as outcome:
        outcome.value = await answer
    if isinstance(outcome.error, asyncio.CancelledError | GeneratorExit):
        raise outcome.error  # this task is cancelled or closed
    return outcome


def _end(session: AgentSession) -> EpisodeEnd:
    if session.cut is Cut.INPUT or session.calls[-1].completion.stop_reason == "length":
        return EpisodeEnd.OUT_OF_TOKENS
    return EpisodeEnd.OUT_OF_TURNS if session.cut is Cut.TURNS else EpisodeEnd.FINISHED
