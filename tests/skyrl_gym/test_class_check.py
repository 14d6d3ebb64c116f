"""A class of environments that no rollout could call is refused by name; whatever can be called is not."""

from __future__ import annotations

import abc
import functools
from typing import Any

import pytest

import skyrl_gym
from skyrl_gym.check import check_env
from skyrl_gym.class_check import wrong_in
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_gym.error import Error


def step(self: Any, action: str) -> Any:
    return {"observations": [], "reward": float(len(action) % 3), "done": True, "metadata": {}}


class Good(BaseTextEnv):
    def __init__(self, env_config: Any, extras: Any, size: int = 1) -> None:
        super().__init__()

    step = step


async def step_async(self: Any, action: str) -> Any:
    return step(self, action)


async def init_async(self: Any, prompt: Any) -> Any:
    return prompt, {}


async def metrics_async(self: Any) -> Any:
    return {}


async def yielding_async(self: Any, action: str) -> Any:
    yield action


def yielding(self: Any, action: str) -> Any:
    yield action


class CallableStep:
    def __call__(self, action: str) -> Any:
        return step(self, action)


class Factory:
    def make(self, env_config: Any, extras: Any) -> Good:
        return Good(env_config, extras)

    __call__ = make


class Later:
    """A descriptor of the user's own: what it gives is known when it is asked."""

    def __get__(self, env: Any, cls: Any) -> Any:
        return functools.partial(step, env)


def env(**attributes: Any) -> type:
    return type("MyEnv", (Good,), attributes)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"step": None}, 'step is "None"; it must be a method step(action)'),
        ({"init": 3}, 'init is "3"; it must be a method init(prompt)'),
        ({"close": None}, 'close is "None"; it must be a method close()'),
        ({"get_metrics": {}}, "it must be a method get_metrics()"),
        ({"aggregate_metrics": None}, "it must be a method aggregate_metrics(metrics)"),
        ({"cut_short": 0.0}, "it must be a method cut_short()"),
        ({"check_machine": None}, "it must be a method check_machine()"),
        ({"gold_actions": ["a"]}, "it must be a method gold_actions()"),
        ({"step_async": None}, "it must be a method step_async(action)"),
        ({"step": step_async}, "step is a coroutine function: define init_async, step_async and close_async instead"),
        ({"get_metrics": metrics_async}, "get_metrics is a coroutine function: define it without `async`"),
        ({"step": yielding}, "step is a generator function"),
        ({"step_async": yielding_async}, "step_async is a generator function"),
        ({"step": lambda self: None}, "it is called as step(action), and step() does not take that: too many"),
        ({"step": lambda self, action, history: None}, "missing a required argument: 'history'"),
        ({"init": lambda self: ([], {})}, "it is called as init(prompt), and init()"),
        ({"aggregate_metrics": lambda self, metrics: {}}, "it is called as aggregate_metrics(metrics)"),
        ({"check_machine": lambda self: None}, "it is called as check_machine()"),
        ({"step": staticmethod(step)}, "it is called as step(action), and step(self"),
        ({"tool_schemas": lambda self: []}, "tool_schemas is read and not called; write @property above it"),
        ({"waits_for_others": lambda self: True}, "waits_for_others is read and not called"),
        ({"init_timeout_s": classmethod(lambda cls: 3.0)}, "init_timeout_s is read and not called"),
        ({"init_async": init_async}, "init_async is never called without a step_async; define that, too, or init"),
        ({"__init__": lambda self, size: None}, "it is called with (env_config=..., extras=...), and there: missing"),
        ({"step": BaseTextEnv.step}, "it defines neither step(action) nor step_async(action)"),
    ],
)
def test_a_class_that_no_rollout_could_call_is_refused_by_name(attributes, words):
    [problem] = wrong_in(env(**attributes))
    assert words in problem
    report = check_env(env(**attributes), extras={}, bad_actions=["x"])
    assert words in next(fact.words for fact in report.facts if not fact.passed)


class Plain:
    def __init__(self, env_config: Any, extras: Any) -> None: ...


class Abstract(Good, abc.ABC):
    @abc.abstractmethod
    def more(self) -> None: ...


async def made_async(env_config: Any, extras: Any) -> Good:
    return Good(env_config, extras)


@pytest.mark.parametrize(
    ("entry_point", "words"),
    [
        (Plain, "it must be a subclass of skyrl_gym.envs.base_text_env.BaseTextEnv"),
        (Abstract, "it is abstract; define more"),
        (made_async, "it is written with `async def`"),
        (lambda config: None, "it is called with (env_config=..., extras=...), and there: missing"),
    ],
)
def test_what_makes_no_environments_is_refused(entry_point, words):
    [problem] = wrong_in(entry_point)
    assert words in problem


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    return inner


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"step": lambda self, action: step(self, action)},
        {"step": CallableStep()},
        {"step": functools.partial(step, None)},
        {"step": functools.partialmethod(step)},
        {"step": staticmethod(lambda action: step(None, action))},
        {"step": classmethod(step)},
        {"step": wrapped(step)},
        {"step": lambda self, *arguments, **named: step(self, *arguments, **named)},
        {"step": Later()},
        {"step": property(lambda self: functools.partial(step, self))},
        {"step_async": step_async},
        {"step_async": lambda self, action: step_async(self, action)},
        {"step_async": step_async, "init_async": init_async},
        {"init_timeout_s": 3, "tool_schemas": None, "waits_for_others": True},
        {"tool_schemas": property(lambda self: [])},
    ],
)
def test_what_can_be_called_is_an_environment(attributes):
    assert list(wrong_in(env(**attributes))) == []
    assert check_env(env(**attributes), extras={}, bad_actions=["x"]).passed


@pytest.mark.parametrize(
    "factory",
    [
        Good,
        lambda env_config, extras: Good(env_config, extras),
        functools.partial(Good, size=2),
        Factory().make,
        Factory(),
    ],
)
def test_what_makes_environments_may_be_any_callable(factory):
    assert list(wrong_in(factory)) == []
    assert check_env(factory, extras={}, bad_actions=["x"]).passed


def test_defaults_of_a_registration_count_as_arguments():
    class Sized(Good):
        def __init__(self, env_config: Any, extras: Any, size: int) -> None:
            super().__init__(env_config, extras)

    assert "missing a required argument: 'size'" in next(iter(wrong_in(Sized)))
    assert list(wrong_in(Sized, size=3)) == []
    skyrl_gym.register("sized", Sized, {"size": 3})
    try:
        assert check_env("sized", extras={}, bad_actions=["x"]).passed
    finally:
        skyrl_gym.envs.deregister("sized")


AN_OBJECT = Good({}, {})


def test_an_object_in_the_place_of_a_class_is_refused_by_its_path():
    with pytest.raises(Error, match=r"test_class_check:AN_OBJECT' is of type Good, and no class or function"):
        skyrl_gym.make(f"{__name__}:AN_OBJECT")
