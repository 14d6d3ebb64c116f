"""Policy losses and advantage estimators by name. A name may also be an import path, "my_pkg.my_mod:my_fn"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from skyrl_gym.contract import NOT_AWAITED
from skyrl_train.config.algorithm import ADVANTAGE_ESTIMATORS, POLICY_LOSSES
from skyrl_train.users_functions import WrongFunction, imported_function, is_async, name_of, parameters_of

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


class FunctionRegistry:
    """Each subclass holds its own table: name -> function, and keeps the names that the configuration accepts."""

    kind: ClassVar[str]
    config_names: ClassVar[set[str]]
    functions: ClassVar[dict[str, Function]]

    def __init_subclass__(cls) -> None:
        cls.functions = {}

    @classmethod
    def register(cls, name: str, function: Function) -> None:
        if name in cls.functions:
            raise ValueError(f"{cls.kind} {name!r} is already registered; unregister it first or take another name")
        cls.functions[name] = function
        cls.config_names.add(name)

    @classmethod
    def get(cls, name: str) -> Function:
        """Return the function registered under `name`, or the one at the import path "package.module:function"."""
        if name in cls.functions:
            return cls.functions[name]
        if ":" in name:
            return imported_function(name, f"the {cls.kind} {name!r}")
        raise ValueError(
            f"Unknown {cls.kind} {name!r}. Available: {', '.join(cls.list_available())}, or a path 'pkg.mod:function'"
        )

    @classmethod
    def list_available(cls) -> list[str]:
        return sorted(cls.functions)

    @classmethod
    def unregister(cls, name: str) -> None:
        if name not in cls.functions:
            raise ValueError(f"{cls.kind} {name!r} is not registered. Registered: {', '.join(cls.list_available())}")
        del cls.functions[name]
        cls.config_names.discard(name)


class PolicyLossRegistry(FunctionRegistry):
    """Functions that return (loss, metrics); see losses.py for the parameters they may name and for what loss is."""

    kind = "policy loss"
    config_names = POLICY_LOSSES


class AdvantageEstimatorRegistry(FunctionRegistry):
    """Functions that return (advantages, returns); see advantages.py for the parameters they may name."""

    kind = "advantage estimator"
    config_names = ADVANTAGE_ESTIMATORS


def register_policy_loss(name: str) -> Callable[[F], F]:
    return _register_as(PolicyLossRegistry, name)


def register_advantage_estimator(name: str) -> Callable[[F], F]:
    return _register_as(AdvantageEstimatorRegistry, name)


def _register_as(registry: type[FunctionRegistry], name: str) -> Callable[[F], F]:
    def register(function: F) -> F:
        registry.register(name, function)
        return function

    return register


def call_with_named(function: Function, offered: dict[str, Any]) -> Any:
    """Call the function with those of the offered values that it names as parameters; **kwargs takes them all.

    WrongFunction for one that needs more, or whose coroutine nobody awaits.
    """
    if is_async(function):
        raise WrongFunction(f"{name_of(function)} {NOT_AWAITED}")
    parameters = parameters_of(function, name_of(function))
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [p.name for p in parameters if p.default is p.empty and p.name not in offered]
    if unknown:
        raise WrongFunction(
            f"{name_of(function)} needs {', '.join(unknown)}, which is not offered. "
            f"Offered: {', '.join(sorted(offered))}"
        )
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in offered]
    named = {p.name for p in parameters} - set(by_place)
    given = {name: value for name, value in offered.items() if name in named or (takes_all and name not in by_place)}
    return function(*[offered[name] for name in by_place], **given)
