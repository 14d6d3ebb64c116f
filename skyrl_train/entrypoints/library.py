"""`from skyrl_train import train`: a run as a function call."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from skyrl_train.config import SkyRLConfig, load_config
from skyrl_train.signals import usual_signals_afterwards

if TYPE_CHECKING:
    from skyrl_train.run.records.summary import Summary


def train(overrides: Iterable[str] | Mapping[str, Any] = (), /, **sections: Mapping[str, Any]) -> Summary:
    """Train from wherever the run in `trainer.ckpt_path` stands, and return its Summary.

    overrides: settings as on the command line, ["trainer.epochs=2"], or a dictionary, {"trainer.epochs": 2} or
    {"trainer": {"epochs": 2}}. sections: the same by section, train(trainer={"epochs": 2}). In both a class or a
    function may stand where its import path may: environment={"env_class": MyEnv, "reward": my_function}.
    ConfigError, ValueError, RunRefused or ModelRefused say what cannot be trained like this. RuntimeError if an event
    loop is running, as in a notebook: call it in a thread there (await asyncio.to_thread(train, ...)).
    """
    from skyrl_train.entrypoints.experiment import BasePPOExp  # it loads torch

    with usual_signals_afterwards():
        result = BasePPOExp(configuration(overrides, sections)).run()
        return asyncio.run(result) if inspect.iscoroutine(result) else result


def configuration(overrides: Iterable[str] | Mapping[str, Any], sections: Mapping[str, Any]) -> SkyRLConfig:
    """Return the checked configuration of a call of `train`."""
    if isinstance(overrides, str):
        raise TypeError(f"overrides={overrides!r} is one text; give a list of them, or a dictionary")
    if sections and overrides != ():
        raise TypeError(f"give settings in one way: all in the first argument, or all as {', '.join(sections)}=...")
    if sections or isinstance(overrides, Mapping):
        return SkyRLConfig.from_dict_config(_plain(sections or overrides)).advised()
    return load_config(list(overrides))


def _plain(value: Any) -> Any:
    """Return a copy with classes and functions replaced by their import paths."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return value
    if "<" in value.__qualname__:
        raise ValueError(f"{value.__qualname__} is made inside a function; give it a place in a module")
    return f"{value.__module__}:{value.__qualname__}"
