"""The calls of one environment: each has a deadline, and everything but a correct answer becomes an EnvFailure."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loguru import logger

from skyrl_gym.contract import (
    Messages,
    NotANumberToLearnFrom,
    Outcome,
    Step,
    WrongAnswer,
    checked_close,
    checked_init,
    checked_metrics,
    checked_pay,
    checked_reward,
    checked_step,
    checked_tool_schemas,
    short,
)
from skyrl_gym.core import EnvFailure, EnvGivenUp, EnvLost
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_gym.error import Error as RegistryError
from skyrl_train.rollout.task import EpisodeLimits, EpisodeTask
from skyrl_train.rollout.waiting import is_done_within
from skyrl_train.spans import span
from skyrl_train.types import Message
from skyrl_train.visible import kept_words, words_of

if TYPE_CHECKING:
    from skyrl_train.rollout.reward import RewardFunction
    from skyrl_train.rollout.rewards import Rewards

MakeEnv = Callable[[str, dict[str, Any]], BaseTextEnv]  # (env_class, extras) -> environment
# Exceptions of wrong code: playing the episode again would raise them again.
MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    RecursionError, RegistryError, StopIteration, SyntaxError, SystemExit, TypeError,
)  # fmt: skip


class BrokenEnv(EnvFailure):
    """The environment's code is wrong: an episode that failed twice with the same error is not played again.

    is_mistake: the kind of error already proves it, so the episode is not played again after the first failure.
    """

    def __init__(self, words: str, is_mistake: bool = False) -> None:
        super().__init__(words)
        self.is_mistake = is_mistake


class EnvCalls:
    """Calls one environment with deadlines. What it raises, a wrong answer and every time-out become an EnvFailure.

    Environments that wait on a network run on the event loop, all others in `executor`, so that none blocks another.
    A thread that hangs cannot be ended from outside; its episode goes on without it.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        task: EpisodeTask,
        limits: EpisodeLimits,
        executor: Executor,
        rewards: Rewards | None = None,
    ) -> None:
        """rewards: what pays the turns, where that is not the environment alone."""
        extras = _Extras(copy.deepcopy(task.prompt.env_extras))  # so that no episode sees another's edits
        own_limit, own_seed = extras.pop("max_turns", None), extras.pop("seed", None)  # null means not given
        self.max_turns = limits.max_turns if own_limit is None else int(own_limit)
        self.seed = task.env_seed if own_seed is None else int(own_seed)
        extras["seed"] = self.seed
        if self.max_turns is not None:
            extras["max_turns"] = self.max_turns
        self._make = partial(make_env, task.prompt.env_class, extras)
        self._name = task.prompt.env_class
        self._env: BaseTextEnv | None = None
        self._executor = executor
        self._in_thread: Future[Any] | None = None  # the last call that was given to the executor
        self._step_timeout_s = limits.step_timeout_s
        self._seconds_left = limits.episode_timeout_s
        self._rewards, self._prompt, self._num_steps, self._metadata = rewards, task.prompt, 0, {}
        self._told: list[tuple[str, Messages]] = []  # replies and observations, for judges
        self._paid: set[str] = set()  # names of the rewards so far

    @property
    def waits_for_others(self) -> bool:
        env = self._env
        return env is not None and Outcome.of(lambda: env.waits_for_others).value is True

    async def init(self, messages: list[Message]) -> Messages:
        env = await self._answer("the constructor", self._threaded(self._constructed, _as_it_is))
        prompt = copy.deepcopy(messages)
        if env.is_async:
            call = self._awaited(_method(env, "init_async", prompt), checked_init)
        else:
            call = self._threaded(_method(env, "init", prompt), checked_init)
        return await self._answer("init", call, env.init_timeout_s)

    async def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the tools that the environment offers in this episode; most offer none and are not asked."""
        env = self._env
        assert env is not None
        if type(env).tool_schemas is BaseTextEnv.tool_schemas:
            return []
        return await self._answer("tool_schemas", self._threaded(lambda: env.tool_schemas, checked_tool_schemas))

    async def step(self, action: str) -> Step:
        assert self._env is not None
        if self._env.is_async:
            call = self._awaited(_method(self._env, "step_async", action), self._checked_step)
        else:
            call = self._threaded(_method(self._env, "step", action), self._checked_step)
        step = await self._answer("step", call)
        return step if self._rewards is None else await self._weighed(self._rewards, action, step)

    def _checked_step(self, answer: Any) -> Step:
        step = checked_step(answer)
        metadata = answer.get("metadata")
        self._metadata = metadata if isinstance(metadata, dict) else {}
        return step

    async def _weighed(self, rewards: Rewards, action: str, step: Step) -> Step:
        """Return the step with what the run's rewards pay for it. A judge is asked after the last one."""
        self._num_steps += 1
        self._told.append((action, step.observations))
        if rewards.alone is not None:
            return replace(step, reward=await self._judged(rewards.alone, action, step), rewards={})
        is_last = step.done or (self.max_turns is not None and self._num_steps >= self.max_turns)
        paid = self._counted(rewards, "step", step.reward, step.rewards)
        for name, function in rewards.functions.items():
            paid[name] = await self._judged(function, action, step)
        if is_last:
            paid |= await self._at_the_end(rewards, is_done=step.done)
        return replace(step, reward=self._total(rewards, paid), rewards=paid)

    async def _judged(self, reward: RewardFunction, action: str, step: Step) -> float:
        """Return what the user's function pays for a step."""
        prompt = copy.deepcopy(self._prompt)  # the function may change what it is given
        facts = {"turn": self._num_steps, "done": step.done, "reward": step.reward, "metadata": self._metadata}
        pay = partial(reward.of_turn, prompt, action, observations=copy.deepcopy(step.observations), **facts)
        call = self._awaited(pay, checked_reward) if reward.is_async else self._threaded(pay, checked_reward)
        return await self._answer(reward.label, call)

    async def _at_the_end(self, rewards: Rewards, *, is_done: bool) -> dict[str, float]:
        """Return what the judges pay for the whole episode. BrokenEnv if the environment left out a reward.

        is_done: the environment has ended the episode. Where a limit has cut it, what would have come later is 0.
        """
        if is_done:
            self._refusing("step", partial(rewards.check_paid, self._paid))
        found = dict.fromkeys(rewards.own_parts - self._paid, 0.0)
        for name, judge in rewards.judges.items():  # whose deadlines are their own
            ask = partial(judge.score, copy.deepcopy(self._prompt), list(self._told))
            found[name] = await self._answer(judge.label, self._awaited(ask, checked_reward), own_timeout_s=math.inf)
        return found

    def _counted(self, rewards: Rewards, what: str, total: float, parts: dict[str, float]) -> dict[str, float]:
        """Return the rewards of the environment's own that count. BrokenEnv for one that has no weight."""
        own = self._refusing(what, partial(rewards.of_environment, total, parts))
        self._paid |= own.keys()
        return own

    def _total(self, rewards: Rewards, paid: dict[str, float]) -> float:
        return self._refusing("environment.rewards", partial(rewards.weighted, paid))

    def _refusing(self, what: str, call: Callable[[], Any]) -> Any:
        """Return what the call returns; a WrongAnswer becomes this environment's failure."""
        outcome = Outcome.of(call)
        if isinstance(outcome.error, WrongAnswer):
            raise failure(outcome.error, self._name, what) from outcome.error
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    async def cut_short(self) -> tuple[float, dict[str, float]]:
        """Return what is added to the last turn's reward, and to its named rewards, where no tokens are left."""
        assert self._env is not None
        rewards = self._rewards
        total, parts = 0.0, {}
        if rewards is None or not rewards.replaces_environment:
            total, parts = await self._answer("cut_short", self._threaded(_method(self._env, "cut_short"), checked_pay))
        if rewards is None:
            return total, parts
        if rewards.alone is not None:  # it alone decides
            return 0.0, {}
        paid = self._counted(rewards, "cut_short", total, parts) | await self._at_the_end(rewards, is_done=False)
        return self._total(rewards, paid), paid

    async def metrics(self) -> dict[str, Any]:
        assert self._env is not None
        return await self._answer("get_metrics", self._threaded(_method(self._env, "get_metrics"), checked_metrics))

    async def close(self) -> None:
        """Close the environment, with deadlines of its own. A failure is logged and changes nothing about the episode.

        A call that a cancelled or timed-out episode left in a thread ends first, so that nothing opens after the close.
        """
        if self._in_thread is not None and not self._in_thread.cancelled():
            await is_done_within(asyncio.wrap_future(self._in_thread), self._step_timeout_s)
        env, self._env = self._env, None
        if env is None:
            return
        if env.is_async:
            close = self._awaited(_method(env, "close_async"), checked_close)
        else:
            close = self._threaded(_method(env, "close"), checked_close)
        if not await is_done_within(close, self._step_timeout_s):
            close.cancel()
            logger.warning(f"{self._name}: close took longer than {self._step_timeout_s:.1f} s")
        elif (error := _raised(close)) is not None:
            logger.warning(f"{self._name}: close raised {words_of(error)}")

    def _constructed(self) -> BaseTextEnv:
        """Make the environment and keep it while still in the thread, so that `close` finds it after a time-out."""
        env = self._make()
        if not isinstance(env, BaseTextEnv):
            raise WrongAnswer(f"made a {type(env).__name__}, which is no skyrl_gym.envs.base_text_env.BaseTextEnv")
        self._env = env
        limit_s = env.init_timeout_s
        if limit_s is not None and not (type(limit_s) in (int, float) and limit_s > 0):
            raise WrongAnswer(f"init_timeout_s must be a number of seconds above 0, or None, not {short(limit_s)}")
        return env

    def _threaded(self, call: Callable[[], Any], check: Callable[[Any], Any]) -> asyncio.Future[Outcome]:
        try:
            self._in_thread = self._executor.submit(Outcome.of, lambda: check(call()))
        except RuntimeError as closed:  # the executor
            refused: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            refused.set_exception(closed)
            return refused
        return asyncio.wrap_future(self._in_thread)

    def _awaited(self, call: Callable[[], Awaitable[Any]], check: Callable[[Any], Any]) -> asyncio.Future[Outcome]:
        return asyncio.get_running_loop().create_task(self._outcome(call, check))

    async def _outcome(self, call: Callable[[], Awaitable[Any]], check: Callable[[Any], Any]) -> Outcome:
        with Outcome() as outcome:
            answer = call()
            if not inspect.isawaitable(answer):
                raise WrongAnswer(f"it returned {short(answer)} to be awaited: write it with `async def`")
            outcome.value = check(await answer)
        if isinstance(outcome.error, asyncio.CancelledError | GeneratorExit):
            raise outcome.error  # this task is cancelled or closed
        return outcome

    async def _answer(self, what: str, call: asyncio.Future[Outcome], own_timeout_s: float | None = None) -> Any:
        started = time.monotonic()
        timeout_s = own_timeout_s or min(self._step_timeout_s, self._seconds_left)
        try:
            with span(f"environment {what.removeprefix('the ')}"):
                is_done = await is_done_within(call, timeout_s)
        finally:  # also when this episode is cancelled: its call must not run on
            if not call.done():
                call.cancel()
        if own_timeout_s is None:
            self._seconds_left -= time.monotonic() - started
        if not is_done:
            raise EnvFailure(f"{self._name}: {what} took longer than {timeout_s:.1f} s")
        error = _raised(call)
        if error is not None:
            raise failure(error, self._name, what) from error
        return call.result().value


class _Extras(dict[str, Any]):
    """The columns of a row. Without a turn limit of run or row "max_turns" is absent, so the environment's own counts.

    An environment without a limit of its own reads extras["max_turns"] without a check and gets 1, SkyRL's default.
    """

    def __missing__(self, key: str) -> Any:
        if key == "max_turns":
            return 1
        raise KeyError(key)


def failure(error: BaseException, name: str, what: str) -> EnvFailure:
    """Return the EnvFailure for an error that the environment, or the check of its answer, raised in the call `what`.

    It is a BrokenEnv if the kind of error says that the code is wrong. Errors of the operating system, exceptions of
    libraries and numbers that are not finite may be gone the next time.
    """
    if isinstance(error, EnvLost):
        return EnvLost(_said(error), in_step=error.in_step)
    if isinstance(error, EnvFailure):
        return (EnvGivenUp if isinstance(error, EnvGivenUp) else EnvFailure)(_said(error))
    if isinstance(error, WrongAnswer):
        words = f"{name}: wrong answer of {what}: {_said(error)}"
        return EnvFailure(words) if isinstance(error, NotANumberToLearnFrom) else BrokenEnv(words)
    words = f"{name}: {what} raised {words_of(error)}"
    is_mistake = isinstance(error, MISTAKES) or what == "the constructor"  # nothing in it fails by chance
    by_chance = isinstance(error, OSError) or type(error).__module__ != "builtins"
    return EnvFailure(words) if by_chance and not isinstance(error, MISTAKES) else BrokenEnv(words, is_mistake)


def _said(error: BaseException) -> str:
    said = Outcome.of(lambda: str(error))
    return kept_words(said.value if said.error is None else f"{type(error).__name__}, which cannot be printed")


def _raised(task: asyncio.Future[Outcome]) -> BaseException | None:
    """Return the error of a task that is done, CancelledError and GeneratorExit included, or None."""
    if task.cancelled():
        return asyncio.CancelledError("its own")
    return task.exception() or task.result().error


def _method(env: BaseTextEnv, name: str, *args: Any) -> Callable[[], Any]:
    """Return a call of the method, which is looked up when it is called; WrongAnswer then for what is no method."""

    def call() -> Any:
        method = getattr(env, name)
        if not callable(method):
            raise WrongAnswer(f"{name} is {short(method)}; it must be a method")
        return method(*args)

    return call


def _as_it_is(answer: Any) -> Any:
    return answer
