"""The contract of every environment (init, step, close and the errors that they may raise) and how one is made."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from skyrl_gym.error import Error
from skyrl_gym.importing import import_named

if TYPE_CHECKING:
    from typing import Self

ObsType = TypeVar("ObsType")
ActType = TypeVar("ActType")
EntryPoint = Callable[..., Any] | str


class EnvFailure(Exception):
    """The environment itself failed: a dead server, a time-out, a missing database.

    Raised by `init` and `step`, never for something the policy wrote. No reward is paid: the rollout plays the episode
    again on a fresh environment with the same seed, and counts the failure. Any other exception and an answer of the
    wrong form (skyrl_gym/contract.py) count as the same; but a mistake in the code, such as a KeyError, is not retried.
    """


class EnvLost(EnvFailure):
    """The environment lost the server it runs on. The rollout waits a moment and plays the episode again, more often
    than after other failures, because a server may take a while to come back.

    in_step: the server was lost during this episode's own step, which may be the cause.
    """

    def __init__(self, message: str, *, in_step: bool) -> None:
        super().__init__(message)
        self.in_step = in_step


class EnvGivenUp(EnvFailure):
    """The environment cannot be played in any more in this run. The rollout does not play the episode again."""


class EnvStepOutput(TypedDict):
    """The keys of the dict that `step` returns."""

    observations: Any
    reward: float
    done: bool
    metadata: dict[str, Any]


class Env(Generic[ObsType, ActType]):
    """One episode of one task. `make` sets `spec` to the recipe it was made with."""

    spec: EnvSpec | None = None

    def init(self, *kwargs: Any) -> tuple[ObsType, dict[str, Any]]:
        """Start the episode. Returns the first observation and a dict of facts about the episode."""
        raise NotImplementedError(f"{type(self).__name__} must define init")

    def step(self, action: ActType) -> EnvStepOutput:
        """Play one action and return what it led to."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def close(self) -> None:
        """Release every resource. It is always called, possibly twice, possibly before `init`."""

    def __str__(self) -> str:
        return f"Env({type(self).__name__})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class EnvSpec:
    """The recipe for one kind of environment: class, factory or "package.module:Class", and constructor defaults."""

    id: str
    entry_point: EntryPoint | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.id

    def make(self, **kwargs: Any) -> Env:
        """Call the entry point with a copy of the spec's kwargs, overridden by `kwargs`, and set the result's `spec`.

        TypeError: the constructor does not take these arguments, or what it made is not an Env.
        """
        arguments = {**copy.deepcopy(self.kwargs), **kwargs}
        constructor = load_entry_point(self.entry_point)
        try:
            env = constructor(**arguments)
        except TypeError as refused:
            raise TypeError(f"environment {self.id!r} cannot be made with {arguments}: {refused}") from refused
        if not isinstance(env, Env):
            raise TypeError(f"{self.entry_point} of {self.id!r} made a {type(env).__name__}, not a skyrl_gym.Env")
        env.spec = replace(self, kwargs=arguments)
        return env

    def to_json(self) -> str:
        """Return the spec as JSON; ValueError if the entry point or a default is a callable, which JSON cannot hold."""
        for key, value in {"entry_point": self.entry_point, **self.kwargs}.items():
            if callable(value):
                raise ValueError(f"{self.id}: {key}={value!r} is callable and has no JSON; use 'package.module:Name'")
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> EnvSpec:
        return EnvSpec(**json.loads(text))

    def pprint(self, disable_print: bool = False, include_entry_points: bool = False) -> str | None:
        """Print the spec, or return the text if `disable_print`."""
        lines = [f"id={self.id}"]
        if include_entry_points:
            lines.append(f"entry_point={self.entry_point}")
        lines += [f"{key}={value!r}" for key, value in sorted(self.kwargs.items())]
        return print_or_return("\n".join(lines), disable_print)


def load_entry_point(entry_point: EntryPoint | None) -> Callable[..., Any]:
    """Return the class or factory that an entry point names, imported if it is a string.

    skyrl_gym.error.Error: it is neither a callable nor "package.module:Class", or there is no such module or name.
    """
    if callable(entry_point):
        return entry_point
    if not entry_point:
        raise Error(f"entry point {entry_point!r} must be a callable or 'package.module:Class'")
    found = import_named(entry_point)
    if not callable(found):
        raise Error(
            f"{entry_point!r} is of type {type(found).__name__}, and no class or function that makes environments"
        )
    return found


def print_or_return(text: str, disable_print: bool) -> str | None:
    """Print the text and return None, or return it if `disable_print`: the convention of every `pprint` here."""
    if disable_print:
        return text
    print(text)
    return None
