"""Functions of the user's: found by their import path, and called with those of the offered values that they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from skyrl_gym.contract import Outcome
from skyrl_gym.error import Error
from skyrl_gym.importing import import_named
from skyrl_train.visible import words_of


class WrongFunction(ValueError):
    """A function of the user's cannot be found, cannot be called as it has to be, or returned something else."""


def name_of(function: Callable[..., Any]) -> str:
    """Return the function's module and name, or its repr if it has none."""
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if name else repr(function)


def imported_function(path: str, label: str) -> Callable[..., Any]:
    """Return the callable at "package.module:function". WrongFunction, which begins with the label, without one."""
    found = Outcome.of(lambda: import_named(path))
    if found.error is not None:
        words = str(found.error) if isinstance(found.error, Error) else words_of(found.error)
        raise WrongFunction(f"{label} cannot be imported: {words}") from found.error
    if not callable(found.value):
        raise WrongFunction(f"{label} is of type {type(found.value).__name__}, and no function")
    return found.value


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call gives a coroutine, as far as that is written: an `async def`, or an object with one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def yields(function: Callable[..., Any]) -> bool:
    """Return whether a call gives a generator, so that nothing of the function runs by it."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def checked_part(made: Any, method: str, *needs: str) -> Any:
    """Return what a method of the user's made. WrongFunction if it lacks one of the attributes that are needed."""
    if lacks := [name for name in needs if not hasattr(made, name)]:
        raise WrongFunction(f"{method} returned {type(made).__name__}, which has no {', '.join(lacks)}")
    return made


def parameters_of(function: Callable[..., Any], label: str) -> list[inspect.Parameter]:
    """Return the parameters of the function. WrongFunction, which begins with the label, if they cannot be read."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise WrongFunction(f"{label} has no parameters that can be read: {error}") from None


class CalledByName:
    """A function that is called with those of the offered values that it names; **kwargs takes all of them."""

    def __init__(self, function: Callable[..., Any], label: str) -> None:
        """WrongFunction, which begins with the label, for a function that cannot be called so, or pays by yielding."""
        parameters = parameters_of(function, label)
        by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if by_place:
            raise WrongFunction(f"{label} takes {', '.join(by_place)} by position; drop the / from it")
        if yields(function):
            raise WrongFunction(f"{label} is a generator function; it must return its answer instead of yielding it")
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.needed = [p.name for p in named if p.default is p.empty]
        self.named = {p.name for p in named}
        self.is_async = is_async(function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._function = function

    def __call__(self, offered: Mapping[str, Any]) -> Any:
        """Return what the function returns for the offered values."""
        taken = offered if self._takes_all else {name: offered[name] for name in self.named & offered.keys()}
        return self._function(**taken)
