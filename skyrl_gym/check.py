"""`check_env` tests whether an environment keeps the contract of BaseTextEnv, and reports each rule that it breaks."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import skyrl_gym
from skyrl_gym.class_check import wrong_in
from skyrl_gym.contract import Outcome, WrongAnswer, checked_pay, refuse_coroutine, short, wrong_messages, wrong_step
from skyrl_gym.core import load_entry_point
from skyrl_gym.envs.base_text_env import BaseTextEnv, ConversationType
from skyrl_gym.threads import in_daemon_thread

LIMIT_S = 60.0  # of one call and of one episode; a run's step_timeout_s has the same default
_MEGABYTE = 1_000_000
_TAGS = ("answer", "solution", "search", "sql", "think", "tool", "python", "action")
NASTY_STRINGS: tuple[str, ...] = (
    "",
    " \n\t ",
    "I do not know.",
    "\x00\x01\x1b[31m\x7f\ufeff\u202e",
    "lone surrogates \ud800 and \udfff",
    "\U0001f3f4\u200d\u2620\ufe0f e\u0301 ١٢٣",
    "9" * 5000,
    "#### --1,,2..3 #### \nAnswer: \nAnswer: \\frac\\sqrt{{ \\boxed{",
    "```python\n```\n``` ```",
    "{" * 10_000 + '"' + "[" * 10_000,
    "".join(f"<{tag}>" for tag in _TAGS) + "\ud800\x00" + "".join(f"</{tag}>" for tag in reversed(_TAGS)),
    "".join(f"</{tag}><{tag}></{tag}></{tag}>" for tag in _TAGS),
    "<tool><no_such_tool>x</no_such_tool></tool><tool></tool><tool>x</tool>",
    "<answer>" * (_MEGABYTE // 8),
    "<sql></solution><search></answer>" * (_MEGABYTE // 33),
    "x" * _MEGABYTE,
)
"""Hostile model replies. `check_env` plays each of them in every turn of an episode."""

_PROMPT: ConversationType = [{"role": "user", "content": "Please begin."}]


@dataclass(frozen=True, slots=True)
class Fact:
    """One rule of the contract, whether the environment keeps it, and what was observed if it does not."""

    name: str
    passed: bool
    words: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}{': ' + self.words if self.words else ''}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    env: str
    facts: tuple[Fact, ...]
    rewards: tuple[float, ...] = ()  # of the episodes that came to their end

    @property
    def passed(self) -> bool:
        return all(fact.passed for fact in self.facts)

    @property
    def failures(self) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if not fact.passed)

    def __str__(self) -> str:
        return "\n".join([f"{self.env}: {'keeps' if self.passed else 'breaks'} the contract", *map(str, self.facts)])


def check_env(
    env_id_or_factory: str | Callable[..., BaseTextEnv],
    *,
    extras: dict[str, Any],
    prompt: ConversationType | None = None,
    env_config: dict[str, Any] | None = None,
    gold_actions: Sequence[str] | None = None,
    bad_actions: Sequence[str] = NASTY_STRINGS,
    limit_s: float = LIMIT_S,
) -> CheckReport:
    """Play episodes with good, hostile and repeated actions, and report which rules of the contract hold.

    extras: a dataset row without prompt and env_class; max_turns 3 and seed 0 are added where it has none, as a rollout
    would. gold_actions: actions that must earn `max_reward`; by default those that the environment offers.
    limit_s: a call or an episode that takes longer ends the check; it may go on in a thread that nothing waits for.
    Faults of the environment are listed in the report; only misuse of this function raises.
    """
    if not isinstance(extras, dict):
        raise TypeError(f"extras must be a dict (a dataset row without prompt and env_class), not {extras!r}")
    if isinstance(env_id_or_factory, str):
        recipe = skyrl_gym.spec(env_id_or_factory)  # an unknown id is misuse
        wrong = wrong_in(load_entry_point(recipe.entry_point), **recipe.kwargs)
        factory, name = partial(skyrl_gym.make, env_id_or_factory), env_id_or_factory
    else:
        factory, name = env_id_or_factory, getattr(env_id_or_factory, "__name__", repr(env_id_or_factory))
        wrong = wrong_in(factory)
    given = {
        column: value for column, value in extras.items() if column not in ("max_turns", "seed") or value is not None
    }
    check = _Check(
        factory,
        extras={"max_turns": 3, "seed": 0, **given},
        prompt=_PROMPT if prompt is None else prompt,
        env_config=env_config or {},
        limit_s=limit_s,
    )
    words = "; ".join(wrong)
    check.expect(check.CLASS, not words, words)
    # A separate thread, because asyncio.run is refused in a thread whose event loop is already running.
    playing = in_daemon_thread(lambda: asyncio.run(check.run(gold_actions, list(bad_actions))))
    while not wait([playing], timeout=0.1).done:
        if check.is_overdue():
            break
    else:
        with suppress(_TooLong):
            playing.result()
    facts = tuple(Fact(fact, not seen, "; ".join(seen)) for fact, seen in check.seen.items())
    return CheckReport(name, facts, tuple(check.rewards))


def example_extras(env_id: str) -> list[dict[str, Any]]:
    """Return the example rows that a registered environment's class offers for `check_env`; [] if it offers none."""
    entry_point = load_entry_point(skyrl_gym.spec(env_id).entry_point)
    offered = getattr(entry_point, "example_extras", None)
    return [] if offered is None else offered()


class _TooLong(Exception):
    """An episode of endless turns ended the check."""


def _plain_answer(call: Callable[..., Any], *args: Any) -> Any:
    """Return what the call returns. WrongAnswer for a coroutine."""
    answer = call(*args)
    refuse_coroutine(answer, getattr(call, "__name__", "it"))
    return answer


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the environment that has not returned yet."""

    fact: str
    what: str
    began_s: float


@dataclass(frozen=True, slots=True)
class _Episode:
    """The observations and rewards of one episode; equal for equal seeds and actions."""

    observations: list[Any]
    rewards: list[float]


class _Check:
    """Plays the episodes and collects in `seen`, for each rule, what contradicts it. Exceptions come back as values."""

    CLASS = "constructor and methods can be called as a rollout calls them"
    MAKES = "Env(env_config=..., extras=...) makes a BaseTextEnv"
    INPUTS = "the given prompt, extras and env_config are left as they were"
    INIT = "init returns (messages, dict)"
    STEP = "step returns messages, a finite reward, done and metadata"
    STRINGS = "no string raises out of step"
    ENDS = "the episode ends within max_turns"
    CLOSE = "close works before init, after the episode, and twice"
    METRICS = "get_metrics is a dict of plain values which aggregate_metrics reduces to numbers"
    SEED = "the same seed and actions give the same observations and rewards"
    GOLD = "the gold actions earn max_reward"

    def __init__(
        self,
        factory: Callable[..., Any],
        *,
        extras: dict[str, Any],
        prompt: ConversationType,
        env_config: dict[str, Any],
        limit_s: float,
    ) -> None:
        self.factory, self.extras, self.prompt, self.env_config = factory, extras, prompt, env_config
        self.limit_s = limit_s
        self.calling: _Call | None = None
        self.given: tuple[Any, Any] = (env_config, extras)  # what the latest environment was made from
        self.seen: dict[str, list[str]] = {}  # of the facts that were looked at
        self.rewards: list[float] = []

    async def run(self, gold_actions: Sequence[str] | None, bad_actions: list[str]) -> None:
        env = await self.make()
        if env is None:
            return
        await self.close(env)  # before init
        gold = await self.gold_actions(gold_actions)
        for action in bad_actions:
            await self.play([action])
        actions = gold or bad_actions[:3] or [""]
        first, second = await self.play(actions), await self.play(actions)
        if first is not None and second is not None:
            self.expect(self.SEED, first == second, f"{short(first)} and then {short(second)}")
        if not gold and not self.seen.get(self.GOLD):
            self.seen.pop(self.GOLD, None)  # nothing was seen of it
        if gold and first is not None:
            total, wanted = sum(first.rewards), type(env).max_reward
            earned = isinstance(wanted, int | float) and math.isclose(total, wanted, abs_tol=1e-6)
            self.expect(
                self.GOLD, earned, f"earned {total}, not {wanted if isinstance(wanted, float) else short(wanted)}"
            )

    def is_overdue(self) -> bool:
        """Return whether the call that is being made takes too long; that is noted then."""
        calling = self.calling
        if calling is None or time.monotonic() - calling.began_s < self.limit_s:
            return False
        self.expect(calling.fact, False, f"{calling.what} took longer than {self.limit_s:g} s: the check ended here")
        return True

    def expect(self, fact: str, holds: bool, words: str) -> bool:
        contradictions = self.seen.setdefault(fact, [])
        if not holds and len(contradictions) < 3:
            contradictions.append(words)
        return holds

    async def call(self, fact: str, what: str, call: Callable[..., Any], *args: Any, is_async: bool = False) -> Any:
        """Return the result of a call, or the exception it raised, which is noted as a contradiction of `fact`.

        is_async: the call is awaited; all others run in a thread, and a coroutine is none of their answers. A rollout
        does the same.
        """
        self.calling = _Call(fact, what, time.monotonic())
        if is_async:
            with Outcome() as outcome:
                outcome.value = await call(*args)
        else:
            outcome = await asyncio.wrap_future(
                in_daemon_thread(partial(Outcome.of, partial(_plain_answer, call, *args)))
            )
        self.calling = None
        error = outcome.error
        words = (
            f"{error}" if isinstance(error, WrongAnswer) else f"{what} raised {type(error).__name__}: {short(error)}"
        )
        self.expect(fact, error is None, words)
        return outcome.value if error is None else error

    async def make(self) -> BaseTextEnv | None:
        config, extras = copy.deepcopy(self.env_config), copy.deepcopy(self.extras)
        self.given = (config, extras)
        env = await self.call(self.MAKES, "the constructor", partial(self.factory, env_config=config, extras=extras))
        if isinstance(env, BaseException):
            return None
        return env if self.expect(self.MAKES, isinstance(env, BaseTextEnv), f"it made a {type(env).__name__}") else None

    async def init(self, env: BaseTextEnv) -> ConversationType | None:
        prompt = copy.deepcopy(self.prompt)
        result = await self.call(
            self.INIT, "init", env.init_async if env.is_async else env.init, prompt, is_async=env.is_async
        )
        self.expect(self.INPUTS, prompt == self.prompt, "init edits the prompt")
        if isinstance(result, BaseException):
            return None
        pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        if not self.expect(self.INIT, pair, f"it returned {short(result)}"):
            return None
        wrong = wrong_messages(result[0]) if result[0] else "no messages"
        return result[0] if self.expect(self.INIT, not wrong, wrong) else None

    async def gold_actions(self, given: Sequence[str] | None) -> list[str]:
        if given is not None:
            return list(given)
        env = await self.make()
        if env is None:
            return []
        offered = None
        if await self.init(env) is not None:
            offered = await self.call(self.GOLD, "gold_actions", env.gold_actions)
        await self.close(env)
        if offered is None or isinstance(offered, BaseException):
            return []
        are_texts = isinstance(offered, list) and all(isinstance(action, str) for action in offered)
        wrong = f"gold_actions returned {short(offered)}, and not a list of texts"
        return offered if self.expect(self.GOLD, are_texts, wrong) else []

    async def play(self, actions: Sequence[str]) -> _Episode | None:
        """Play one episode with these actions, repeating the last one until the end; None if it breaks off."""
        env = await self.make()
        if env is None:
            return None
        messages = await self.init(env)
        episode = None if messages is None else await self.steps(env, messages, actions)
        await self.metrics(env)
        await self.close(env)
        return episode

    async def steps(self, env: BaseTextEnv, messages: ConversationType, actions: Sequence[str]) -> _Episode | None:
        observations: list[Any] = [messages]
        rewards: list[float] = []
        output: Any = {"done": False}
        own_limit = env.max_turns
        if not self.expect(self.ENDS, isinstance(own_limit, int), f"its max_turns is {short(own_limit)}, not a number"):
            return None
        began_s = time.monotonic()
        for turn in range(max(self.extras["max_turns"], own_limit)):
            action = actions[min(turn, len(actions) - 1)]
            what = f"step({short(action)})"
            output = await self.call(
                self.STRINGS, what, env.step_async if env.is_async else env.step, action, is_async=env.is_async
            )
            if isinstance(output, BaseException):
                return None
            wrong = wrong_step(output)
            if not self.expect(self.STEP, not wrong, f"{what}: {wrong}"):
                return None
            observations.append(copy.deepcopy(output["observations"]))
            rewards.append(checked_pay(output["reward"])[0])
            if output["done"]:
                break
            if time.monotonic() - began_s > self.limit_s:
                words = f"not done after {len(rewards)} turns and {self.limit_s:g} s: the check ended here"
                self.expect(self.ENDS, False, words)
                raise _TooLong
        self.rewards.append(sum(rewards))
        self.expect(self.ENDS, output["done"], f"not done after {len(rewards)} turns of {short(actions[-1])}")
        return _Episode(observations, rewards)

    async def metrics(self, env: BaseTextEnv) -> None:
        metrics = await self.call(self.METRICS, "get_metrics", env.get_metrics)
        if isinstance(metrics, BaseException):
            return
        plain = isinstance(metrics, dict) and all(
            isinstance(key, str) and (value is None or isinstance(value, bool | int | float | str))
            for key, value in metrics.items()
        )
        if not self.expect(self.METRICS, plain, f"get_metrics returned {short(metrics)}"):
            return
        means = await self.call(self.METRICS, "aggregate_metrics", type(env).aggregate_metrics, [metrics, metrics])
        if not isinstance(means, BaseException):
            numbers = isinstance(means, dict) and all(isinstance(value, int | float) for value in means.values())
            self.expect(self.METRICS, numbers, f"aggregate_metrics returned {short(means)}")

    async def close(self, env: BaseTextEnv) -> None:
        for _ in range(2):
            await self.call(self.CLOSE, "close", env.close_async if env.is_async else env.close, is_async=env.is_async)
        self.expect(self.INPUTS, self.given == (self.env_config, self.extras), "extras or env_config were edited")
