"""A reward function of the user's: it pays instead of the environment.

environment.reward=my_module:my_function, or one of several in environment.rewards (rewards.py).

def score(reply, answer):
    return float(answer in reply)

It is called after each turn, with those of these that it names as parameters, and returns what the turn earns:

  reply         what the model wrote
  prompt        the messages of the row
  ground_truth  reward_spec.ground_truth, if the row has one
  row           all columns of the row; each column is also offered under its own name
  turn          the number of this turn, from 1
  done          whether the environment ended the episode with this turn
  reward        what the environment itself would have paid
  observations  the messages with which the environment answered
  metadata      what else its step returned; in OpenEnv `observation`, the server's fields, and `server_reward`

An `async def` is awaited; any other function runs in a thread, one call per episode at a time, several at once. An
exception counts as a failure of the environment, never as a reward.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from skyrl_gym.contract import Outcome, checked_reward
from skyrl_gym.error import Error
from skyrl_gym.importing import import_named
from skyrl_train.rollout.env_calls import words_of
from skyrl_train.types import Prompt

ALWAYS = ("reply", "prompt", "row", "turn", "done", "reward", "observations", "metadata")
KNOWN_AFTER_A_STEP = {"reward", "observations", "metadata"}  # a function that names one of these is not tried before
TRIED_REPLIES = ("I do not know.", "")


class RewardFunction:
    """The function that `environment.reward`, or an entry of `environment.rewards`, names."""

    def __init__(self, name: str, function: Callable[..., Any], key: str = "environment.reward") -> None:
        """ValueError if the parameters of the function cannot be read."""
        self.label = f"{key}={name}"
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.label} has no parameters that can be read: {error}") from None
        by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if by_place:
            raise ValueError(f"{self.label} takes {', '.join(by_place)} by position; drop the / from it")
        self._function = function
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self._named = {p.name for p in named}
        self._needed = [p.name for p in named if p.default is p.empty]
        self.is_async = inspect.iscoroutinefunction(function)

    @classmethod
    def named(cls, name: str, key: str = "environment.reward") -> RewardFunction:
        """Return the function at the import path. ValueError if there is none."""
        found = Outcome.of(lambda: import_named(name))
        if isinstance(found.error, Error):
            raise ValueError(f"{key}: {found.error}") from found.error
        if found.error is not None:
            words = f"{key}={name} cannot be imported: {words_of(found.error)}"
            raise ValueError(words) from found.error
        function = found.value
        if not callable(function):
            raise ValueError(f"{key}={name} is a {type(function).__name__}, not a function")
        return cls(name, function, key)

    def of_turn(self, prompt: Prompt, reply: str, **facts: Any) -> Any:
        """Return what the function returns for a reply; facts: those of ALWAYS that only the step told."""
        before = {"turn": 1, "done": True, "reward": 0.0, "observations": [], "metadata": {}}
        always = {"reply": reply, "prompt": prompt.messages, "row": prompt.env_extras, **before, **facts}
        offered = {**columns(prompt), **always}
        taken = offered if self._takes_all else {name: offered[name] for name in self._named & offered.keys()}
        return self._function(**taken)

    def check(self, prompts: Iterable[Prompt], within_s: float) -> None:
        """Refuse a function that needs what a row does not have, or that fails on two replies to the first prompt.

        It is not tried if it is `async` (it may ask a judge who costs money) or needs what only an environment knows.
        """
        first: Prompt | None = None
        for prompt in prompts:
            first = first or prompt
            lacks = [name for name in self._needed if name not in ALWAYS and name not in columns(prompt)]
            if lacks:
                raise ValueError(
                    f"{self.label} needs {', '.join(lacks)}, which prompt {prompt.uid} lacks; "
                    f"offered are {', '.join((*ALWAYS, *columns(prompt)))}"
                )
        if first is None or self.is_async or self._named & KNOWN_AFTER_A_STEP:
            return
        for reply in TRIED_REPLIES:
            outcome = _within(within_s, lambda reply=reply: checked_reward(self.of_turn(copy.deepcopy(first), reply)))
            if outcome is None:
                raise ValueError(f"{self.label} took longer than {within_s:g} s for one reply")
            if outcome.error is not None:
                raise ValueError(
                    f"{self.label} fails on prompt {first.uid} with the reply {reply!r}: {words_of(outcome.error)}"
                )


def columns(prompt: Prompt) -> dict[str, Any]:
    """Return what the row offers by name: its columns, and its ground truth if it has one."""
    found = {name: value for name, value in prompt.env_extras.items() if name not in ALWAYS}
    for column in ("reward_spec", "reward_model"):
        spec = prompt.env_extras.get(column)
        if isinstance(spec, Mapping) and "ground_truth" in spec:
            found.setdefault("ground_truth", spec["ground_truth"])
    return found


def _within(seconds: float, call: Callable[[], Any]) -> Outcome | None:
    """Return the outcome of the call; None if it takes longer, and then its thread is left behind."""
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(Outcome.of(call)), name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else None
