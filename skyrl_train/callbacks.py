"""Callbacks: a user's code at the events of a run, without a subclass of anything else. The names are SkyRL's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from skyrl_gym.contract import NOT_AWAITED, Outcome
from skyrl_train.users_functions import WrongFunction, is_async, yields

Metrics = dict[str, float]


@dataclass
class CallbackInput:
    """The state of the run at an event: `metrics` at step and eval ends, `logs` at on_log, `ckpt_path` at on_save."""

    global_step: int  # finished steps; in on_step_start the step that begins
    epoch: int
    total_steps: int
    steps_per_epoch: int
    batch: Any = None  # the trained batch, in on_step_end
    metrics: Metrics | None = None
    logs: Metrics | None = None  # what is about to be logged; a callback may add to it
    ckpt_path: str | None = None


@dataclass
class TrainingControl:
    """The requests of callbacks; the trainer does them after the step and sets the flags back."""

    should_save: bool = False
    should_evaluate: bool = False

    def reset(self) -> None:
        self.should_save = self.should_evaluate = False


class TrainingCallback:
    """Override the events you care about. `trainer` has cfg, tracker, tokenizer and global_step."""

    def on_train_start(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_train_end(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_epoch_start(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_epoch_end(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_step_start(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_step_end(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_eval_start(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_eval_end(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_save(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...
    def on_log(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...


EVENTS = {name for name in vars(TrainingCallback) if name.startswith("on_")}


def check_callbacks(callbacks: Any) -> list[TrainingCallback]:
    """Return the callbacks, one or several, as a list.

    ValueError for what is no callback, and for an event that never comes or is a coroutine.
    """
    if isinstance(callbacks, TrainingCallback):
        callbacks = [callbacks]
    if not isinstance(callbacks, Iterable):
        raise ValueError(f"callbacks must be a list of TrainingCallbacks, not {callbacks!r}")
    checked = list(callbacks)
    for callback in checked:
        name = type(callback).__name__
        if inspect.isclass(callback):
            raise ValueError(f"{callback.__name__} is a class; give an object of it: {callback.__name__}()")
        if not isinstance(callback, TrainingCallback):
            raise ValueError(
                f"{name} is no TrainingCallback; derive it from skyrl_train.utils.callbacks.TrainingCallback"
            )
        vain = sorted(method for method in dir(callback) if method.startswith("on_") and method not in EVENTS)
        if vain:
            raise ValueError(f"{name}.{', '.join(vain)} is never called; the events are {', '.join(sorted(EVENTS))}")
        for event in EVENTS:
            try:
                inspect.signature(getattr(callback, event)).bind(None, None, None)
            except TypeError as error:
                raise ValueError(f"{name}.{event} must take (trainer, callback_input, control): {error}") from error
            if is_async(getattr(callback, event)):
                raise ValueError(f"{name}.{event} {NOT_AWAITED}")
            if yields(getattr(callback, event)):
                raise ValueError(
                    f"{name}.{event} is a generator function, so a call does nothing; write it without yield"
                )
    return checked


def numbers_of(metrics: Any, whose: str) -> Metrics:
    """Return what a user's code measured as names and plain numbers. WrongFunction if it is anything else."""
    if not isinstance(metrics, dict):
        raise WrongFunction(f"{whose} must be a dict of names and numbers, not {type(metrics).__name__}")
    return {_name(name, whose): _number(name, value, whose) for name, value in metrics.items()}


def _name(name: Any, whose: str) -> str:
    if not isinstance(name, str):
        raise WrongFunction(f"{whose} must be a dict of names and numbers; {name!r} is no text")
    return name


def _number(name: str, value: Any, whose: str) -> float:
    if isinstance(value, int | float):
        return value
    number = Outcome.of(lambda: float(value))
    if number.error is not None or isinstance(value, str):
        raise WrongFunction(f"{whose} must be a dict of names and numbers; {name} is of type {type(value).__name__}")
    return number.value
