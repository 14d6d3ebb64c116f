"""The registry: from an environment's id to an environment."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from skyrl_gym import error
from skyrl_gym.core import Env

EntryPoint = Callable[..., Any] | str


@dataclass(frozen=True)
class EnvSpec:
    """How to make one kind of environment: a class, a factory or "package.module:Class", and constructor defaults."""

    id: str
    entry_point: EntryPoint | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.id

    def make(self, **kwargs: Any) -> Env:
        return make(self, **kwargs)

    def to_json(self) -> str:
        """The spec as JSON. Only what can be written down can: a callable is refused."""
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
        return _print_or_return("\n".join(lines), disable_print)


registry: dict[str, EnvSpec] = {}


def register(id: str, entry_point: EntryPoint | None = None, kwargs: dict[str, Any] | None = None) -> None:
    """Make `id` known. A string entry point is imported only when an environment is made."""
    if entry_point is None:
        raise AssertionError(f"register({id!r}) needs an entry_point: a class, a factory or 'package.module:Class'")
    if id in registry:
        raise error.RegistrationError(
            f"{id!r} is already registered, to {registry[id].entry_point}; deregister it first"
        )
    registry[id] = EnvSpec(id, entry_point, dict(kwargs or {}))


def deregister(id: str) -> None:
    """Forget `id`."""
    spec(id)
    del registry[id]


def spec(id: str) -> EnvSpec:
    """The spec registered under `id`."""
    if id not in registry:
        known = ", ".join(sorted(registry)) or "none"
        raise error.Error(
            f"no environment {id!r} is registered; known: {known} (pprint_registry() prints them). "
            "Yours becomes known with skyrl_gym.register(id, entry_point) before the run starts"
        )
    return registry[id]


def make(id: str | EnvSpec, **kwargs: Any) -> Env:
    """An environment: the spec's entry point called with a copy of the spec's kwargs, overridden by these."""
    wanted = id if isinstance(id, EnvSpec) else spec(id)
    arguments = {**copy.deepcopy(wanted.kwargs), **kwargs}
    constructor = load_entry_point(wanted.entry_point)
    try:
        env = constructor(**arguments)
    except TypeError as refused:
        raise TypeError(f"environment {wanted.id!r} cannot be made with {arguments}: {refused}") from refused
    if not isinstance(env, Env):
        raise TypeError(f"{wanted.entry_point} of {wanted.id!r} made a {type(env).__name__}, not a skyrl_gym.Env")
    env.spec = replace(wanted, kwargs=arguments)
    return env


def load_entry_point(entry_point: EntryPoint | None) -> Callable[..., Any]:
    """The class or factory behind an entry point."""
    if callable(entry_point):
        return entry_point
    module, _, name = (entry_point or "").partition(":")
    if not module or not name:
        raise error.Error(f"entry point {entry_point!r} must be a callable or 'package.module:Class'")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as missing:
        raise error.Error(f"entry point {entry_point!r}: module {module} has no {name}") from missing


def pprint_registry(
    print_registry: Mapping[str, EnvSpec] = registry, *, num_cols: int = 3, disable_print: bool = False
) -> str | None:
    """Print the registered ids in columns, or return the text if `disable_print`."""
    ids = sorted(print_registry)
    width = max(map(len, ids), default=0)
    rows = [ids[start : start + num_cols] for start in range(0, len(ids), num_cols)]
    return _print_or_return("\n".join("  ".join(id.ljust(width) for id in row).rstrip() for row in rows), disable_print)


def _print_or_return(text: str, disable_print: bool) -> str | None:
    if disable_print:
        return text
    print(text)
    return None
