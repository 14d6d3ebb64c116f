"""environment.rewards: several rewards by name, each with a weight, and the settings of a language-model judge.

environment.rewards.right=my_module:score                                   a function of yours; its weight is 1
environment.rewards.brief={function: my_module:brief, weight: 0.2}          with another weight
environment.rewards.played={function: environment, weight: 0.5}             all that the environment itself pays
environment.rewards.format=0.1                                              what it pays under the name `format`
environment.rewards.good={function: judge, base_url: ..., model: ...}       a language model's opinion
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from skyrl_gym.contract import REWARD_NAME
from skyrl_gym.importing import is_import_path

ENVIRONMENT, JUDGE = "environment", "judge"
UNNAMED = "unnamed"  # what is paid beside the named rewards
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_BODY = ("messages", "model", "n", "stream")  # of a request to the judge


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Address, question and time limits of a judge."""

    base_url: str = ""  # of any endpoint that speaks OpenAI's API: http://127.0.0.1:8000/v1
    model: str = ""
    api_key_env: str | None = None  # name of the environment variable that holds the key; the key itself is not kept
    rubric: str | None = None  # what is good; null: right, complete and helpful
    template: str | None = None  # path of a text with {prompt}, {reply} or {conversation}; null: the built-in one
    concurrency: int = 8  # requests under way
    timeout_s: float = 60.0  # for one request
    retries: int = 3  # after a failed request or an answer without a score
    temperature: float | None = 0.0  # null: the endpoint's default
    max_tokens: int | None = 512  # null: the endpoint's default
    body: Mapping[str, Any] | None = None  # further fields of the request

    def problems(self) -> Iterator[str]:
        """Return what is wrong, in words."""
        for name, kinds in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                yield f"{name}={value} has the wrong type"
                return
        if not self.base_url or not self.model:
            yield "a judge needs base_url (such as http://127.0.0.1:8000/v1) and model"
            return
        yield from self._wrong_address()
        if self.api_key_env is not None and not VARIABLE.fullmatch(self.api_key_env):
            yield "api_key_env must be the name of an environment variable, not the key itself"
        if self.rubric is not None and not self.rubric.strip():
            yield "rubric is empty"
        if not 1 <= self.concurrency <= 1024 or not 0 <= self.retries <= 100:
            yield "concurrency must be from 1 to 1024 and retries from 0 to 100"
        if not 0 < self.timeout_s < math.inf:
            yield "timeout_s must be above 0"
        if self.max_tokens is not None and self.max_tokens < 1:
            yield "max_tokens must be at least 1"
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            yield "temperature must be at least 0"
        if own := [name for name in OWN_BODY if name in (self.body or {})]:
            yield f"body may not set {', '.join(own)}"

    def _wrong_address(self) -> Iterator[str]:
        try:
            address = urlsplit(self.base_url)
            _ = address.port  # ValueError if it is none
        except ValueError as error:
            yield f"base_url cannot be read: {error}"
            return
        if address.scheme not in ("http", "https") or not address.hostname:
            yield f"base_url={self.base_url} must begin with http:// or https://"
        elif address.username or address.password or address.query or address.fragment:
            yield "base_url may hold no user, password or query, for the run's folder keeps it; use api_key_env"


_NUMBER: tuple[type, ...] = (int, float)
TYPES: dict[str, tuple[type, ...]] = {
    "base_url": (str,), "model": (str,), "api_key_env": (str, type(None)), "rubric": (str, type(None)),
    "template": (str, type(None)), "concurrency": (int,), "timeout_s": _NUMBER, "retries": (int,),
    "temperature": (*_NUMBER, type(None)), "max_tokens": (int, type(None)), "body": (Mapping, type(None)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NamedReward:
    """One entry of environment.rewards. function: an import path, "environment" or "judge"; "" for a part of its own.

    A part of its own is what the environment pays under this name.
    """

    function: str
    weight: float = 1.0
    judge: JudgeSettings | None = None

    @property
    def is_own_part(self) -> bool:
        return self.function == ""

    @classmethod
    def of(cls, value: Any) -> NamedReward:
        """Return the entry that a configuration gives. ValueError says what is wrong with it."""
        if _is_number(value):
            return cls("", _weight(value))
        if isinstance(value, str):
            value = {"function": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"must be {_FORMS}")
        settings = dict(value)
        function, weight = settings.pop("function", None), _weight(settings.pop("weight", 1.0))
        if not isinstance(function, str) or not (function in (ENVIRONMENT, JUDGE) or is_import_path(function)):
            known = f"no function: {_FORMS}"
            raise ValueError(f"has {known}" if function is None else f"has function={function}, which is {known}")
        known = [field.name for field in fields(JudgeSettings)] if function == JUDGE else []
        if unknown := [str(name) for name in settings if name not in known]:
            takes = ", ".join(["function", "weight", *known])
            raise ValueError(
                f"has {', '.join(unknown)}, which is unknown beside function={function}; known are {takes}"
            )
        if function != JUDGE:
            return cls(function, weight)
        judge = JudgeSettings(**settings)
        for problem in judge.problems():
            raise ValueError(problem)
        return cls(function, weight, judge)


_FORMS = (
    "my_module:my_function, environment or judge; {function: ..., weight: 0.5}; or, for a part that the environment "
    "pays under this name, its weight alone"
)


def named_rewards(rewards: Mapping[str, Any]) -> dict[str, NamedReward]:
    """Return environment.rewards, read. ValueError for the first entry that is wrong."""
    return {name: NamedReward.of(value) for name, value in rewards.items()}


def wrong_rewards(rewards: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Return (name, value, what is wrong with it) of each entry, or with all of them ("", None, ...)."""
    read: dict[str, NamedReward] = {}
    for name, value in rewards.items():
        if not isinstance(name, str) or not REWARD_NAME.fullmatch(name) or name == UNNAMED:
            yield str(name), value, f"must have a letter, then letters, digits, _ or - as its name, and not {UNNAMED}"
            continue
        try:
            read[name] = NamedReward.of(value)
        except ValueError as error:
            shown = {} if isinstance(value, Mapping) and value.get("function") == JUDGE else value
            yield name, shown, str(error)
    if len(read) < len(rewards) or not read:
        return
    wholes = [name for name, reward in read.items() if reward.function == ENVIRONMENT]
    if len(wholes) > 1 or (wholes and any(reward.is_own_part for reward in read.values())):
        yield wholes[0], rewards[wholes[0]], "counts what the environment pays twice beside the others; name it once"
    if not any(reward.weight for reward in read.values()):
        yield "", None, "all weigh 0, so nothing would be learned; give one a weight"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weight(value: Any) -> float:
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"has weight={value}, which is no finite number")
    return float(value)
