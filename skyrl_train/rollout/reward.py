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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import wait
from functools import partial
from typing import Any

from skyrl_gym.contract import Outcome, WrongAnswer, checked_reward
from skyrl_gym.threads import in_daemon_thread
from skyrl_train.types import Prompt
from skyrl_train.users_functions import CalledByName, imported_function
from skyrl_train.visible import words_of

ALWAYS = ("reply", "prompt", "row", "turn", "done", "reward", "observations", "metadata")
KNOWN_AFTER_A_STEP = {"reward", "observations", "metadata"}  # a function that names one of these is not tried before
TRIED_REPLIES = ("I do not know.", "")


class RewardFunction:
    """The function that `environment.reward`, or an entry of `environment.rewards`, names."""

    def __init__(self, name: str, function: Callable[..., Any], key: str = "environment.reward") -> None:
        """ValueError if the function cannot be called."""
        self.label = f"{key}={name}"
        self._call = CalledByName(function, self.label)
        self.is_async = self._call.is_async

    @classmethod
    def named(cls, name: str, key: str = "environment.reward") -> RewardFunction:
        """Return the function at the import path. ValueError if there is none."""
        return cls(name, imported_function(name, f"{key}={name}"), key)

    def of_turn(self, prompt: Prompt, reply: str, **facts: Any) -> Any:
        """Return what the function returns for a reply; facts: those of ALWAYS that only the step told."""
        before = {"turn": 1, "done": True, "reward": 0.0, "observations": [], "metadata": {}}
        always = {"reply": reply, "prompt": prompt.messages, "row": prompt.env_extras, **before, **facts}
        return self._call({**columns(prompt), **always})

    def check(self, prompts: Iterable[Prompt], within_s: float) -> None:
        """Refuse a function that needs what a row does not have, or that fails on two replies to the first prompt.

        It is not tried if it is `async` (it may ask a judge who costs money) or needs what only an environment knows.
        """
        first: Prompt | None = None
        for prompt in prompts:
            first = first or prompt
            lacks = [name for name in self._call.needed if name not in ALWAYS and name not in columns(prompt)]
            if lacks:
                raise ValueError(
                    f"{self.label} needs {', '.join(lacks)}, which prompt {prompt.uid} lacks; "
                    f"offered are {', '.join((*ALWAYS, *columns(prompt)))}"
                )
        if first is None or self.is_async or self._call.named & KNOWN_AFTER_A_STEP:
            return
        for reply in TRIED_REPLIES:
            outcome = _within(within_s, lambda reply=reply: checked_reward(self.of_turn(copy.deepcopy(first), reply)))
            if outcome is None:
                raise ValueError(f"{self.label} took longer than {within_s:g} s for one reply")
            if outcome.error is not None:
                error = outcome.error
                words = str(error) if isinstance(error, WrongAnswer) else words_of(error)
                raise ValueError(f"{self.label} fails on prompt {first.uid} with the reply {reply!r}: {words}")


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
    outcome = in_daemon_thread(partial(Outcome.of, call))
    return outcome.result() if wait([outcome], seconds).done else None
