"""A check of an experiment's overrides: somebody must call them, and they must take what they are called with."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

# SkyRL's methods that nothing here calls, and what to do instead.
NEVER_CALLED: Mapping[str, str] = {
    "get_cfg_as_str": "the settings of a run are in its report; drop the method",
    "get_colocate_pg": "trainer.placement and its like alone say where models lie; drop the method",
    "get_inference_client": "override get_engine(policy), which returns the engine that samples",
    "get_tracker": "choose trackers with trainer.logger, or override extra_metrics() to log more with every step",
    "_setup_trainer": "override get_trainer(...) or get_callbacks()",
    "setup_trainer": "override get_trainer(...) or get_callbacks()",
    "init_tracker": "choose trackers with trainer.logger",
    "build_models": "override get_policy(), get_reference(policy) or get_learner(policy)",
    "get_models": "override get_policy(), get_reference(policy) or get_learner(policy)",
    "get_dataset": "override get_train_dataset() or get_eval_dataset()",
    "get_train_dataloader": "override get_train_dataset(); which rows a step plays follows from trainer.seed",
    "get_reward_model": "rewards come from the environment's step, or from environment.rewards (a judge, too)",
}
ALIKE = 0.85  # of difflib: get_tokeniser is meant to be get_tokenizer


def check_overrides(experiment: Any, base: type) -> None:
    """Raise ValueError if the class of `experiment` overrides a method in vain."""
    problems = list(vain_overrides(type(experiment), base))
    if problems:
        raise ValueError("\n".join(problems))


def vain_overrides(cls: type, base: type) -> Iterator[str]:
    """Yield a sentence for each method between `cls` and `base` that nobody would call, or not in this way."""
    hooks = [name for name in dir(base) if not name.startswith("__")]
    for parent in cls.__mro__:
        if parent is base:
            return
        for name, attribute in vars(parent).items():
            where = f"{parent.__qualname__}.{name}"
            if name in hooks:
                yield from _wrong_signature(where, attribute, inspect.getattr_static(base, name))
            elif name in NEVER_CALLED:
                yield f"{where} is never called: {NEVER_CALLED[name]}"
            elif callable(attribute) and not _is_used(name, cls):
                for near in difflib.get_close_matches(name, hooks, n=1, cutoff=ALIKE):
                    yield f"{where} is never called; did you mean {near}?"


def _wrong_signature(where: str, override: Any, original: Any) -> Iterator[str]:
    """Yield what is wrong: an override is called as the original is, with its parameters by position."""
    if not inspect.isfunction(original):
        return
    function = getattr(override, "__func__", override)  # of a static or class method
    if not inspect.isfunction(function):
        yield f"{where} must be a method, as in the class that it overrides; it is {override!r}"
        return
    given = [p for p in inspect.signature(original).parameters.values() if p.default is p.empty]
    num_given = len(given) - isinstance(override, staticmethod)
    try:
        inspect.signature(function).bind(*[None] * num_given)
    except TypeError as error:
        yield (
            f"{where}{inspect.signature(function)} cannot be called: it is given "
            f"({', '.join(p.name for p in given)}), and there {error}"
        )


def _is_used(name: str, cls: type) -> bool:
    """Return whether code of the class or its parents uses this name: then it is a method of the user's own."""
    functions = [vars(parent).get(key) for parent in cls.__mro__ for key in vars(parent)]
    return any(name in f.__code__.co_names for f in functions if inspect.isfunction(f))
