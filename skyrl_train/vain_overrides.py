"""A check of a user's overrides: somebody must call them, and they must take what they are called with."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from skyrl_gym.contract import NOT_AWAITED
from skyrl_train.users_functions import yields

MAY_BE_ASYNC = {"postprocess_generator_output", "run", "shape_rewards"}  # what they return is awaited if it can be
CALLED_BY_NAME = {"get_trainer"}  # with keywords, as SkyRL calls it
ALIKE = 0.85  # of difflib: get_tokeniser is meant to be get_tokenizer


def refuse_vain_overrides(cls: type, base: type, never_called: Mapping[str, str]) -> None:
    """Raise ValueError with all that `vain_overrides` finds."""
    problems = list(vain_overrides(cls, base, never_called))
    if problems:
        raise ValueError("\n".join(problems))


def vain_overrides(cls: type, base: type, never_called: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each method between `cls` and `base` that nobody would call, or not in this way.

    never_called: SkyRL's methods that `base` does not have, and what to do instead of each.
    """
    hooks = [name for name in dir(base) if not name.startswith("__")]
    for parent in cls.__mro__:
        if parent is base:
            return
        for name, attribute in vars(parent).items():
            where = f"{parent.__qualname__}.{name}"
            if name in hooks:
                yield from _wrong_signature(where, attribute, inspect.getattr_static(base, name))
            elif _is_used(name, cls, never_called):
                continue
            elif name in never_called:
                yield f"{where} is never called: {never_called[name]}"
            elif callable(attribute):
                for near in difflib.get_close_matches(name, hooks, n=1, cutoff=ALIKE):
                    yield f"{where} is never called; did you mean {near}?"


def _wrong_signature(where: str, override: Any, original: Any) -> Iterator[str]:
    """Yield what is wrong: an override is called as the original is, by position but for CALLED_BY_NAME."""
    if not inspect.isfunction(original):
        return
    function = getattr(override, "__func__", override)  # of a static or class method
    if not inspect.isfunction(function):
        yield f"{where} must be a method, as in the class that it overrides; it is {override!r}"
        return
    if yields(function) and not yields(original):
        yield f"{where} is a generator function, so a call does nothing; it must return its answer"
        return
    is_async = inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(original)
    if is_async and where.rpartition(".")[2] not in MAY_BE_ASYNC:
        yield f"{where} {NOT_AWAITED}"
        return
    given = [p for p in inspect.signature(original).parameters.values() if p.default is p.empty]
    is_static = isinstance(override, staticmethod)
    names = [p.name for p in given][is_static:]
    num_by_place = 1 - is_static if where.rpartition(".")[2] in CALLED_BY_NAME else len(names)
    try:
        inspect.signature(function).bind(*names[:num_by_place], **dict.fromkeys(names[num_by_place:]))
    except TypeError as error:
        yield (
            f"{where}{inspect.signature(function)} cannot be called: it is given "
            f"({', '.join(p.name for p in given)}), and there {error}"
        )


def _is_used(name: str, cls: type, never_called: Mapping[str, str]) -> bool:
    """Return whether another method of the class or its parents uses this name: then it is one of the user's own."""
    others = {key for parent in cls.__mro__ for key in vars(parent)} - {name, *never_called}
    functions = [vars(parent).get(key) for parent in cls.__mro__ for key in others]
    return any(name in f.__code__.co_names for f in functions if inspect.isfunction(f))
