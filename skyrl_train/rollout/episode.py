"""One episode: the policy and an environment take turns until one of the typed ends is reached."""

from __future__ import annotations

import asyncio
import copy
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

from loguru import logger

from skyrl_gym.core import EnvFailure
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_train.engine.base import Completion, Engine, Request, SamplingParams
from skyrl_train.rollout.chat import Chat, ChatTemplate
from skyrl_train.rollout.lockstep import Lockstep
from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.spans import span
from skyrl_train.types import EpisodeEnd, Message, Prompt, Trajectory, Turn

MakeEnv = Callable[[str, dict[str, Any]], BaseTextEnv]  # (env_class, extras) -> environment


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Where an episode stops, whatever the policy and the environment do."""

    max_turns: int | None  # None: the environment's `done` decides, unless the row has a max_turns
    max_input_length: int  # tokens; a turn is not started on a longer input
    max_context: int  # tokens the model can read, reply included
    step_timeout_s: float  # for one call of the environment
    episode_timeout_s: float  # for all calls of one episode together


class Cut(StrEnum):
    """The limits of the run (or of the row) that end an episode before its environment says done."""

    TURNS = "turns"
    INPUT = "input"


@dataclass(frozen=True, slots=True)
class EpisodeTask:
    """Which episode is to be played."""

    prompt: Prompt
    repetition: int
    env_seed: int
    sampling: SamplingParams
    sampling_seed: int

    @property
    def id(self) -> str:
        """SkyRL's TrajectoryID as a string."""
        return f"{self.prompt.uid}_{self.repetition}"


class EnvCalls:
    """One environment behind deadlines. Whatever it raises, and every time-out, becomes an EnvFailure.

    Environments that wait on a network run on the event loop, all others in `executor`, so that none blocks the rest.
    A thread that hangs cannot be ended from outside; its episode goes on without it.
    """

    def __init__(self, make_env: MakeEnv, task: EpisodeTask, limits: EpisodeLimits, executor: Executor) -> None:
        extras = _Extras(copy.deepcopy(task.prompt.env_extras))  # so that no episode sees another's edits
        own_limit = extras.pop("max_turns", None)  # the row's own values win
        self.max_turns = limits.max_turns if own_limit is None else int(own_limit)
        if self.max_turns is not None:
            extras["max_turns"] = self.max_turns
        extras.setdefault("seed", task.env_seed)
        self._make = partial(make_env, task.prompt.env_class, extras)
        self._name = task.prompt.env_class
        self._env: BaseTextEnv | None = None
        self._executor = executor
        self._in_thread: Future[Any] | None = None  # the last call that was given to the executor
        self._step_timeout_s = limits.step_timeout_s
        self._seconds_left = limits.episode_timeout_s

    @property
    def waits_for_others(self) -> bool:
        return self._env is not None and self._env.waits_for_others

    async def init(self, messages: list[Message]) -> list[Message]:
        env = await self._answer("constructor", self._threaded(self._constructed))
        init = env.init_async if env.is_async else partial(self._threaded, env.init)
        conversation, _ = await self._answer("init", init(copy.deepcopy(messages)), env.init_timeout_s)
        return conversation

    async def step(self, action: str) -> dict[str, Any]:
        assert self._env is not None
        step = self._env.step_async if self._env.is_async else partial(self._threaded, self._env.step)
        return await self._answer("step", step(action))

    async def cut_short(self) -> float:
        assert self._env is not None
        return float(await self._answer("cut_short", self._threaded(self._env.cut_short)))

    async def metrics(self) -> dict[str, Any]:
        assert self._env is not None
        return await self._answer("get_metrics", self._threaded(self._env.get_metrics))

    async def close(self) -> None:
        """Runs on every path, has deadlines of its own, and never hides how the episode ended.

        A call that a cancelled or timed-out episode left in a thread ends first, so that nothing opens after the close.
        """
        if self._in_thread is not None and not self._in_thread.cancelled():
            await asyncio.wait([asyncio.wrap_future(self._in_thread)], timeout=self._step_timeout_s)
        if self._env is None:
            return
        close = self._env.close_async if self._env.is_async else partial(self._threaded, self._env.close)
        self._env, task = None, asyncio.ensure_future(close())
        await asyncio.wait([task], timeout=self._step_timeout_s)
        if not task.done():
            task.cancel()
            logger.warning(f"{self._name}: close took longer than {self._step_timeout_s:.1f} s")
        elif not task.cancelled() and (error := task.exception()) is not None:
            logger.warning(f"{self._name}: close raised {error!r}")

    def _constructed(self) -> BaseTextEnv:
        """Kept at once, in the thread: an environment that nobody waits for any more is closed all the same."""
        self._env = self._make()
        return self._env

    async def _threaded(self, call: Callable[..., Any], *args: Any) -> Any:
        self._in_thread = self._executor.submit(call, *args)
        return await asyncio.wrap_future(self._in_thread)

    async def _answer(self, what: str, call: Awaitable[Any], own_timeout_s: float | None = None) -> Any:
        started = time.monotonic()
        timeout_s = own_timeout_s or min(self._step_timeout_s, self._seconds_left)
        task = asyncio.ensure_future(call)
        try:
            with span(f"environment {what}"):
                await asyncio.wait([task], timeout=timeout_s)
        finally:  # also when this episode is cancelled: nothing may go on behind its back
            if not task.done():
                task.cancel()
        if own_timeout_s is None:
            self._seconds_left -= time.monotonic() - started
        if not task.done() or task.cancelled():
            raise EnvFailure(f"{self._name}: {what} took longer than {timeout_s:.1f} s")
        error = task.exception()
        if isinstance(error, EnvFailure):
            raise error
        if error is not None:
            where = "".join(traceback.format_exception(error)[-3:]).strip()
            raise EnvFailure(f"{self._name}: {what} raised {where}") from error
        return task.result()


class _Extras(dict[str, Any]):
    """The columns of a row. Where nobody set a turn limit, "max_turns" is absent, so an environment takes its own.

    An environment without a limit of its own reads extras["max_turns"] unasked and gets 1, SkyRL's default.
    """

    def __missing__(self, key: str) -> Any:
        if key == "max_turns":
            return 1
        raise KeyError(key)


@dataclass
class Episode:
    """Plays one EpisodeTask once. `waits_for` says at any moment what the episode waits for."""

    task: EpisodeTask
    engine: Engine
    template: ChatTemplate
    limits: EpisodeLimits
    env: EnvCalls
    lockstep: Lockstep | None = None  # of reproducible rollouts
    attempt: int = 0
    waits_for: str = "its start"
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    cut: Cut | None = None  # what the run did to an episode that its environment would have gone on with

    async def play(self) -> Trajectory:
        """Raises EnvFailure if the environment broke; the environment is closed on every path."""
        started = time.monotonic()
        try:
            self.waits_for = "the environment's init"
            async with self._beginning():
                self.messages = await self.env.init(self.task.prompt.messages)
            end = await self._turns(self.template.start(self.messages))
            self.waits_for = "the environment's metrics"
            metrics = await self.env.metrics()
        finally:
            self.waits_for = "the environment's close"
            with span("environment close"):
                await _to_its_end(self.env.close())
            await self.engine.forget(self._session_id)
        return Trajectory(
            prompt=self.task.prompt,
            repetition=self.task.repetition,
            seed=int(self.task.prompt.env_extras.get("seed", self.task.env_seed)),
            messages=self.messages,
            turns=self.turns,
            end=end,
            env_metrics=metrics,
            num_attempts=self.attempt + 1,
            seconds=time.monotonic() - started,
        )

    @property
    def _session_id(self) -> str:
        return f"{self.task.id}_{self.attempt}"

    def _beginning(self) -> AbstractAsyncContextManager[None]:
        if self.lockstep is None:
            return nullcontext()
        return self.lockstep.beginning(self.task.id, lambda: self.env.waits_for_others)

    async def _turns(self, chat: Chat) -> EpisodeEnd:
        while True:
            sampling = self._next_sampling(chat)
            if sampling is None:
                self.cut = Cut.INPUT
                await self._cut_short()
                return EpisodeEnd.OUT_OF_TOKENS
            if self.lockstep is not None:
                self.waits_for = "the other episodes"
                await self.lockstep.arrive(self.task.id)
            self.waits_for = "the engine"
            with span("generate", turn=len(self.turns) + 1, prompt_tokens=len(chat.ids)):
                request = Request(chat.ids, sampling, self._session_id, in_round=self.lockstep is not None)
                completion = await self.engine.generate(request)
            self.waits_for = "the environment's step"
            step = await self.env.step(completion.text)
            is_last = self.env.max_turns is not None and len(self.turns) + 1 >= self.env.max_turns
            over = step["done"] or is_last
            self._record(chat, completion, step, over)
            if over:
                if not step["done"]:
                    self.cut = Cut.TURNS
                return _how_it_ended(completion, step)

    async def _cut_short(self) -> None:
        """No tokens are left for another turn: the environment says what that costs."""
        if self.turns:
            self.waits_for = "the environment's cut_short"
            last = self.turns[-1]
            self.turns[-1] = replace(last, reward=last.reward + await self.env.cut_short())

    def _next_sampling(self, chat: Chat) -> SamplingParams | None:
        """None if what is about to be sent is too long for another turn."""
        sampling = self.task.sampling
        max_tokens = min(sampling.max_tokens, self.limits.max_context - len(chat.ids))
        if len(chat.ids) > self.limits.max_input_length or max_tokens < 1:
            return None
        seed = derive_seed(self.task.sampling_seed, "turn", len(self.turns))
        return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens), seed=seed)

    def _record(self, chat: Chat, completion: Completion, step: dict[str, Any], over: bool) -> None:
        reply_ids, logprobs = (completion.response_ids, completion.logprobs) if over else chat.kept(completion)
        self.turns.append(
            Turn(
                prompt_ids=chat.ids,
                response_ids=reply_ids,
                logprobs=logprobs,
                reward=float(step["reward"]),
                text=completion.text,
                stop_reason=completion.stop_reason,
                policy_version=completion.policy_version,
                observation=step["observations"],
            )
        )
        if over:
            return
        edited = step.get("postprocessed_action")
        if edited is None or edited == completion.text:
            chat.append(reply_ids, step["observations"])
        else:
            chat.append_edited(edited, step["observations"])


async def _to_its_end(closing: Coroutine[Any, Any, None]) -> None:
    """Also when this episode is cancelled once more meanwhile. What is closed has deadlines of its own."""
    task, cancelled = asyncio.ensure_future(closing), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def _how_it_ended(completion: Completion, step: dict[str, Any]) -> EpisodeEnd:
    if completion.stop_reason == "length":
        return EpisodeEnd.OUT_OF_TOKENS
    if step.get("truncated") or not step["done"]:
        return EpisodeEnd.OUT_OF_TURNS
    return EpisodeEnd.FINISHED
