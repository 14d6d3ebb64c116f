"""A class of environments, or a function that makes them, is checked for what a rollout calls and reads.

No environment is made, so nothing of it runs. What a constructor sets on one environment is seen when an episode is
played.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partialmethod
from types import FunctionType
from typing import Any

from skyrl_gym.contract import NOT_AWAITED, short, words_for_coroutine
from skyrl_gym.envs.base_text_env import BaseTextEnv

CALLED = (
    "init", "step", "close", "init_async", "step_async", "close_async",
    "cut_short", "get_metrics", "aggregate_metrics", "check_machine", "gold_actions", "example_extras",
)  # fmt: skip
READ = ("tool_schemas", "waits_for_others", "init_timeout_s", "max_reward")
_BINDS = (FunctionType, classmethod, staticmethod, partialmethod)  # other descriptors compute what is called


def wrong_in(entry_point: Callable[..., Any], **kwargs: Any) -> Iterator[str]:
    """Yield a sentence for each thing in which an entry point cannot be used. kwargs: the defaults that it is given."""
    if inspect.iscoroutinefunction(entry_point):
        yield f"it {NOT_AWAITED}"
    with suppress(ValueError):  # a callable without a signature that can be read
        try:
            inspect.signature(entry_point).bind(**{**kwargs, "env_config": {}, "extras": {}})
        except TypeError as error:
            yield f"it is called with (env_config=..., extras=...), and there: {error}"
    if isinstance(entry_point, type):
        yield from _wrong_attributes(entry_point)


def _wrong_attributes(cls: type) -> Iterator[str]:
    """Yield a sentence for each attribute of a class of environments that cannot be used as BaseTextEnv's is."""
    if not issubclass(cls, BaseTextEnv):
        yield "it must be a subclass of skyrl_gym.envs.base_text_env.BaseTextEnv"
        return
    if inspect.isabstract(cls):
        yield f"it is abstract; define {', '.join(sorted(getattr(cls, '__abstractmethods__')))}"  # noqa: B009
    if cls.step is BaseTextEnv.step and cls.step_async is BaseTextEnv.step_async:
        yield "it defines neither step(action) nor step_async(action)"
    for name in CALLED:
        attribute = inspect.getattr_static(cls, name)
        if attribute is not inspect.getattr_static(BaseTextEnv, name):
            yield from _wrong_method(cls, name, attribute)
    for name in READ:
        if callable(attribute := inspect.getattr_static(cls, name)) or isinstance(attribute, classmethod):
            yield f"{name} is read and not called; write @property above it"
    if cls.step_async is BaseTextEnv.step_async:
        for name in ("init_async", "close_async"):
            if getattr(cls, name) is not getattr(BaseTextEnv, name):
                yield f"{name} is never called without a step_async; define that, too, or {name.removesuffix('_async')}"


def _wrong_method(cls: type, name: str, attribute: Any) -> Iterator[str]:
    original = _bound(BaseTextEnv, name, inspect.getattr_static(BaseTextEnv, name))
    names = list(inspect.signature(original).parameters)
    form = f"{name}({', '.join(names)})"
    if not isinstance(attribute, _BINDS):
        if hasattr(attribute, "__get__"):
            return
        if not callable(attribute):
            yield f"{name} is {short(attribute)}; it must be a method {form}"
            return
    method = _bound(cls, name, attribute)
    if inspect.iscoroutinefunction(method) and not inspect.iscoroutinefunction(original):
        yield words_for_coroutine(name)
    elif inspect.isasyncgenfunction(method) or (inspect.isgeneratorfunction(method) and not name.endswith("_async")):
        yield f"{name} is a generator function; it must return its answer instead of yielding it"
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # of a function in C
        return
    try:
        signature.bind(*[None] * len(names))
    except TypeError as error:
        yield f"it is called as {form}, and {name}{signature} does not take that: {error}"


def _bound(cls: type, name: str, attribute: Any) -> Callable[..., Any]:
    """Return what a call calls: without `self`, unless the method is called on the class."""
    if not isinstance(attribute, _BINDS):
        return attribute
    is_of_class = isinstance(inspect.getattr_static(BaseTextEnv, name), classmethod | staticmethod)
    return attribute.__get__(None if is_of_class else object(), cls)
