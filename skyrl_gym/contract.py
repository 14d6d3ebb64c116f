"""What an environment may return: each answer is checked and copied as plain values; WrongAnswer says what is wrong.

A rollout passes every answer through `checked_init`, `checked_step` or `checked_metrics` before it uses it.
`wrong_step` and `wrong_messages` are for `check_env`, which asks a little more: the whole documented form.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from types import TracebackType
from typing import Any

MAX_REWARD = 1e9  # float32 still tells 64 apart there, and squares of it can still be summed over a gradient
_ROLES = {"system", "user", "assistant", "tool"}

Messages = list[dict[str, Any]]


class WrongAnswer(ValueError):
    """What is wrong with something that an environment returned, in words."""


class NotANumberToLearnFrom(WrongAnswer):
    """A reward that is NaN, infinite or huge: a simulator may yield one by chance."""


@dataclass(frozen=True, slots=True)
class Step:
    """One answer of an environment, as far as the rollout reads it. Nothing in it is shared with the environment."""

    observations: Messages
    reward: float
    done: bool
    truncated: bool
    postprocessed_action: str | None


class Outcome(AbstractContextManager["Outcome"]):
    """What a call into foreign code came to: its `value`, or the `error` that it raised, SystemExit included."""

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
    """The conversation out of what `init` returned."""
    _refuse_coroutine(answer, "init")
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise WrongAnswer(f"it must return (messages, dict), not {short(answer)}")
    conversation = checked_messages(answer[0])
    if not conversation:
        raise WrongAnswer("it returned no messages: the model would have nothing to answer")
    return conversation


def checked_step(answer: Any) -> Step:
    """What `step` returned."""
    _refuse_coroutine(answer, "step")
    if not isinstance(answer, dict):
        raise WrongAnswer(f"it must return a dict with observations, reward, done and metadata, not {short(answer)}")
    missing = [key for key in ("observations", "reward", "done") if key not in answer]
    if missing:
        raise WrongAnswer(f"it must return observations, reward, done and metadata; {', '.join(missing)} is missing")
    truncated = answer.get("truncated")
    edited = answer.get("postprocessed_action")
    if not isinstance(edited, str | None):
        raise WrongAnswer(f"postprocessed_action must be a string or None: {short(edited)}")
    step = Step(
        observations=checked_messages(answer["observations"]),
        reward=checked_reward(answer["reward"]),
        done=_flag(answer["done"], "done"),
        truncated=truncated is not None and _flag(truncated, "truncated"),
        postprocessed_action=None if edited is None else _text(edited, "postprocessed_action"),
    )
    if step.truncated and not step.done:
        raise WrongAnswer("truncated without done")
    return step


def checked_reward(reward: Any) -> float:
    """A number that can be learned from. A bool counts as 1 or 0, and a tensor or array with one element as that."""
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


def checked_metrics(metrics: Any) -> dict[str, Any]:
    """What `get_metrics` returned, with plain values."""
    _refuse_coroutine(metrics, "get_metrics")
    if not isinstance(metrics, dict):
        raise WrongAnswer(f"it must return a dict, not {short(metrics)}")
    return {str(key): _plain(value, f"metric {short(key)}", default=_listed) for key, value in metrics.items()}


def checked_close(answer: Any) -> None:
    """What `close` returned is not read; a coroutine would mean that nothing was closed."""
    _refuse_coroutine(answer, "close")


def checked_messages(messages: Any) -> Messages:
    """A list of messages, copied: an environment may go on writing in its own."""
    if not isinstance(messages, list | tuple):
        raise WrongAnswer(f"messages must be a list, not {short(messages)}")
    return [_message(message) for message in messages]


def wrong_messages(messages: Any) -> str:
    """What is wrong with a list of messages, or nothing."""
    try:
        checked = checked_messages(messages)
    except WrongAnswer as wrong:
        return str(wrong)
    roles = [message for message in checked if message["role"] not in _ROLES]
    return f"role must be one of {sorted(_ROLES)}: {short(roles[0])}" if roles else ""


def wrong_step(answer: Any) -> str:
    """What is wrong with a step's answer, or nothing."""
    try:
        checked_step(answer)
    except WrongAnswer as wrong:
        return str(wrong)
    if not isinstance(answer.get("metadata"), dict):
        return f"metadata must be a dict, not {short(answer.get('metadata'))}"
    return wrong_messages(answer["observations"])


def short(value: Any) -> str:
    """At most 80 characters of a value, in ASCII; its type where it cannot be written."""
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


def _text(text: str, what: str) -> str:
    """As a str and no subclass of it."""
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
    """The number or bool in an array or tensor that holds just one; any other value as it is."""
    if isinstance(value, int | float | str) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # several elements
        return value


def _plain(value: Any, what: str, default: Callable[[Any], Any] | None = None) -> Any:
    """A copy of the value that JSON, a tokenizer and a report can write. NaN is allowed: nothing is learned from it."""
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
    """What JSON has no word for: arrays as lists, everything else as text."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _refuse_coroutine(answer: Any, method: str) -> None:
    if inspect.iscoroutine(answer):
        answer.close()
        raise WrongAnswer(f"{method} is a coroutine function: define init_async, step_async and close_async instead")
