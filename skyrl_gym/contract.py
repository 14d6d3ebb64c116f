"""Checks of the values that an environment returns; each is copied as plain values, or refused with WrongAnswer.

A rollout passes every answer through `checked_init`, `checked_step` or `checked_metrics` before it uses it.
`wrong_step` and `wrong_messages` are for `check_env`, which is stricter: it also checks metadata and the roles of
messages.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from types import TracebackType
from typing import Any

MAX_REWARD = 1e9  # float32 has a spacing of 64 there, and sums of its squares do not overflow
REWARD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")  # becomes part of a metric's name
MAX_NAMED_REWARDS = 32  # of one turn; each name is a metric
_ROLES = {"system", "user", "assistant", "tool"}

Messages = list[dict[str, Any]]


class WrongAnswer(ValueError):
    """An environment returned a value of the wrong form; the message says what is wrong with it."""


class NotANumberToLearnFrom(WrongAnswer):
    """A reward that is NaN, infinite or huge: a simulator may yield one by chance."""


@dataclass(frozen=True, slots=True)
class Step:
    """The part of a step's answer that the rollout reads, copied: the environment holds no reference to it."""

    observations: Messages
    reward: float  # the sum of `rewards`, where the environment names them
    done: bool
    truncated: bool
    postprocessed_action: str | None
    rewards: dict[str, float] = field(default_factory=dict)  # by name; empty where the environment pays one number


class Outcome(AbstractContextManager["Outcome"]):
    """The result of a call into an environment's code: its `value`, or the `error` it raised (also SystemExit)."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], Any]) -> Outcome:
        with cls() as outcome:
            outcome.value = call()
        return outcome

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


def checked_init(answer: Any) -> Messages:
    """Return a copy of the first messages out of the pair that `init` returned; WrongAnswer if there are none."""
    refuse_coroutine(answer, "init")
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise WrongAnswer(f"it must return (messages, dict), not {short(answer)}")
    conversation = checked_messages(answer[0])
    if not conversation:
        raise WrongAnswer("it returned no messages: the model would have nothing to answer")
    return conversation


def checked_step(answer: Any) -> Step:
    """Return what `step` returned as a Step; WrongAnswer if a key is missing or a value has the wrong type."""
    refuse_coroutine(answer, "step")
    if not isinstance(answer, dict):
        raise WrongAnswer(f"it must return a dict with observations, reward, done and metadata, not {short(answer)}")
    missing = [key for key in ("observations", "reward", "done") if key not in answer]
    if missing:
        raise WrongAnswer(f"it must return observations, reward, done and metadata; {', '.join(missing)} is missing")
    truncated = answer.get("truncated")
    edited = answer.get("postprocessed_action")
    if not isinstance(edited, str | None):
        raise WrongAnswer(f"postprocessed_action must be a string or None: {short(edited)}")
    reward, rewards = checked_pay(answer["reward"])
    step = Step(
        observations=checked_messages(answer["observations"]),
        reward=reward,
        rewards=rewards,
        done=_flag(answer["done"], "done"),
        truncated=truncated is not None and _flag(truncated, "truncated"),
        postprocessed_action=None if edited is None else _text(edited, "postprocessed_action"),
    )
    if step.truncated and not step.done:
        raise WrongAnswer("truncated without done")
    return step


def checked_reward(reward: Any) -> float:
    """Return the reward as a float. A bool counts as 1 or 0, a tensor or array with one element as that element.

    NotANumberToLearnFrom: it is NaN, infinite or beyond ±MAX_REWARD. WrongAnswer: it is no number.
    """
    if inspect.iscoroutine(reward):
        reward.close()
        raise WrongAnswer("reward must be one finite float, not a coroutine, which nobody awaits: write `async def`")
    number = _python_scalar(reward)
    if not isinstance(number, Real | Decimal):
        raise WrongAnswer(f"reward must be one finite float, not {short(reward)} ({type(reward).__name__})")
    try:
        value = float(number)
    except OverflowError:  # an int of more than 308 digits
        value = math.inf
    except ValueError:  # Decimal's signalling NaN
        value = math.nan
    if not math.isfinite(value):
        raise NotANumberToLearnFrom(f"reward must be a finite float, not {value}")
    if abs(value) > MAX_REWARD:
        words = f"reward must lie within ±{MAX_REWARD:g} to be learned from, not {value:g}: scale it down"
        raise NotANumberToLearnFrom(words)
    return value


def checked_pay(reward: Any) -> tuple[float, dict[str, float]]:
    """Return what a turn pays and, where it is a mapping of name to number, its rewards by name; else {} for these.

    WrongAnswer, as for `checked_reward`: one of the numbers is none, or a name could not be the name of a metric.
    """
    if not isinstance(reward, Mapping):
        return checked_reward(reward), {}
    if not 1 <= len(reward) <= MAX_NAMED_REWARDS:
        raise WrongAnswer(f"reward must name 1 to {MAX_NAMED_REWARDS} rewards, not {len(reward)}")
    named = {}
    for name, value in reward.items():
        if not isinstance(name, str) or not REWARD_NAME.fullmatch(name):
            raise WrongAnswer(f"a reward's name is a letter, then letters, digits, _ or -, not {short(name)}")
        try:
            named[name] = checked_reward(value)
        except WrongAnswer as wrong:
            raise type(wrong)(f"reward {name}: {wrong}") from None
    return checked_reward(sum(named.values())), named


def checked_metrics(metrics: Any) -> dict[str, Any]:
    """Return what `get_metrics` returned, with keys as text and values that JSON can hold."""
    refuse_coroutine(metrics, "get_metrics")
    if not isinstance(metrics, dict):
        raise WrongAnswer(f"it must return a dict, not {short(metrics)}")
    named = {_text(str(key), "the name of a metric"): value for key, value in metrics.items()}
    return {key: _plain(value, f"metric {short(key)}", default=_listed) for key, value in named.items()}


def checked_close(answer: Any) -> None:
    """Refuse a coroutine: it would mean that nothing was closed. Any other result of `close` is ignored."""
    refuse_coroutine(answer, "close")


def checked_tool_schemas(schemas: Any) -> list[dict[str, Any]]:
    """Return a copy of the tools that an environment offers, [] for None; WrongAnswer if one is no function."""
    if not isinstance(schemas, list | tuple | None):
        raise WrongAnswer(f"tool_schemas must be a list or None, not {short(schemas)}")
    return [_tool_schema(schema) for schema in schemas or ()]


def checked_messages(messages: Any) -> Messages:
    """Return a copy of a list of messages, because an environment may go on changing its own."""
    if not isinstance(messages, list | tuple):
        raise WrongAnswer(f"messages must be a list, not {short(messages)}")
    return [_message(message) for message in messages]


def refuse_coroutine(answer: Any, method: str) -> None:
    """Raise WrongAnswer if a method that is called without `await` returned a coroutine."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise WrongAnswer(words_for_coroutine(method))


NOT_AWAITED = "is written with `async def`, and nobody awaits it; write it with `def`"


def words_for_coroutine(method: str) -> str:
    """Return what is wrong with a method that nobody awaits, and what to do instead."""
    instead = "define it without `async`"
    if method in ("init", "step", "close"):
        instead = "define init_async, step_async and close_async instead"
    return f"{method} is a coroutine function: {instead}"


def wrong_messages(messages: Any) -> str:
    """Return what is wrong with a list of messages, or ""."""
    try:
        checked = checked_messages(messages)
    except WrongAnswer as wrong:
        return str(wrong)
    roles = [message for message in checked if message["role"] not in _ROLES]
    return f"role must be one of {sorted(_ROLES)}: {short(roles[0])}" if roles else ""


def wrong_step(answer: Any) -> str:
    """Return what is wrong with a step's answer, metadata and roles included, or ""."""
    try:
        checked_step(answer)
    except WrongAnswer as wrong:
        return str(wrong)
    if not isinstance(answer.get("metadata"), dict):
        return f"metadata must be a dict, not {short(answer.get('metadata'))}"
    return wrong_messages(answer["observations"])


def short(value: Any) -> str:
    """Return the value as a quoted ASCII text of about 80 characters at most; its type if str() fails."""
    written = Outcome.of(lambda: str(value))
    text = f"a {type(value).__name__}" if written.error else written.value
    return json.dumps(text if len(text) <= 80 else text[:60] + f"… ({len(text)} characters)")


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise WrongAnswer(f"a message needs role and content: {short(message)}")
    if not isinstance(message["role"], str) or not isinstance(message["content"], str):
        raise WrongAnswer(f"role must be one of {sorted(_ROLES)} and content a string: {short(message)}")
    given = {str(key): value for key, value in message.items() if value is not None}
    return {key: _text(v, key) if isinstance(v, str) else _plain(v, f"message field {key}") for key, v in given.items()}


def _tool_schema(schema: Any) -> dict[str, Any]:
    function = schema.get("function") if isinstance(schema, dict) and schema.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        words = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
        raise WrongAnswer(f"each of tool_schemas must be {words}, not {short(schema)}")
    return _plain(schema, f"tool {short(function['name'])}")


def _text(text: str, what: str) -> str:
    """Return the text as a plain str (not a subclass); WrongAnswer if UTF-8 cannot encode it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        words = f"{what} cannot be encoded as UTF-8 (see skyrl_gym.reply.printable): {short(text)}"
        raise WrongAnswer(words) from None
    return str.__str__(text)


def _flag(value: Any, what: str) -> bool:
    flag = _python_scalar(value)
    if not isinstance(flag, bool):
        raise WrongAnswer(f"done and truncated must be bools: {what} is {short(value)} ({type(value).__name__})")
    return flag


def _python_scalar(value: Any) -> Any:
    """Return the only element of an array or tensor as a Python scalar; any other value unchanged."""
    if isinstance(value, int | float | str) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # several elements
        return value


def _plain(value: Any, what: str, default: Callable[[Any], Any] | None = None) -> Any:
    """Return a copy of the value through JSON, in UTF-8. NaN is allowed here: no gradient depends on it."""
    scalar = _python_scalar(value)
    try:
        if isinstance(scalar, int):
            float(scalar)  # a mean is taken of it
        text = json.dumps(scalar, ensure_ascii=False, default=default)
        text.encode("utf-8")
        return json.loads(text)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise WrongAnswer(f"{what} must be plain numbers and texts, not {short(value)}") from None


def _listed(value: Any) -> Any:
    """Return an array as a list and any other value that JSON does not know as text."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
