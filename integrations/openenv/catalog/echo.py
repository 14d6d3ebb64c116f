"""echo_env: make the environment say exactly the requested words. The smallest task in which a model learns to act."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random
from typing import Any, ClassVar, Self

from integrations.openenv.catalog.entry import InvalidAction, Messages, Task
from integrations.openenv.catalog.options import NoOptions
from integrations.openenv.catalog.scored import ScoredEntry
from integrations.openenv.catalog.words import WORDS

WORDS_PER_MESSAGE = 3
INSTRUCTION = "The environment echoes what you write between <action> and </action>. Make it echo these words exactly."
EXAMPLE = "red lamp tree"
MAX_COMPARED_CHARS = 200  # more than any request; keeps the comparison cheap whatever the policy writes


@dataclass(frozen=True, slots=True)
class EchoAction:
    """The action: a message to echo."""

    message: str

    def fields(self) -> dict[str, Any]:
        """Return the action as the current server takes it: a call of its tool echo_message."""
        return {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": self.message}}


@dataclass(frozen=True, slots=True)
class EchoObservation:
    """An observation: what the environment said; None after reset or a failed tool call."""

    echoed: str | None
    error: str | None = None

    @classmethod
    def from_fields(cls, observation: dict[str, Any]) -> Self:
        if "echoed_message" in observation:  # servers before 2026
            return cls(str(observation["echoed_message"]))
        result, error = observation.get("result"), observation.get("error")
        if isinstance(error, dict):
            return cls(None, str(error.get("message")))
        data = result.get("data") if isinstance(result, dict) else result
        return cls(data if isinstance(data, str) else None)


class EchoEntry(ScoredEntry):
    """Three words are asked for; the reward is how much of them the environment said back."""

    name: ClassVar[str] = "echo_env"
    image: ClassVar[str] = "ghcr.io/meta-pytorch/openenv-echo-env:latest"
    server_module: ClassVar[str] = "integrations.openenv.servers.echo_env"

    def tasks(self, random: Random, num_tasks: int, options: NoOptions) -> list[Task]:
        messages: dict[str, None] = {}
        while len(messages) < num_tasks:
            messages[" ".join(random.sample(WORDS, WORDS_PER_MESSAGE))] = None
        return [
            Task(_prompt(message), family="three_words", ground_truth=message, solution=message) for message in messages
        ]

    def parse(self, text: str) -> dict[str, Any]:
        message = text.strip()
        if not message:
            raise InvalidAction("Your action is empty. Write the words between <action> and </action>.")
        return EchoAction(message).fields()

    def observation_text(self, observation: dict[str, Any]) -> str:
        seen = EchoObservation.from_fields(observation)
        if seen.error is not None:
            return f"The environment could not do that: {seen.error}"
        return "" if seen.echoed is None else f"The environment said: {seen.echoed}"

    def score(self, ground_truth: str, observation: dict[str, Any]) -> float:
        """Return 2M/T, where M is the number of matching characters (in order) and T the length of both texts together.

        1.0 only if the texts are equal.
        """
        echoed = EchoObservation.from_fields(observation).echoed
        if echoed is None:
            return 0.0
        if echoed == ground_truth:
            return 1.0
        said = echoed[:MAX_COMPARED_CHARS]
        return SequenceMatcher(None, ground_truth, said, autojunk=False).ratio() * len(said) / len(echoed)


def _prompt(message: str) -> Messages:
    """Return the prompt: one example as earlier turns, then the task.

    The wording is measured with SmolLM2-135M-Instruct: at temperature 1 an eighth of the replies hold an action (mean
    reward 0.11), greedily a quarter (0.28). Wordings that repeat "Echo:" before the words start at 0.3 and 0.97.
    """
    return [
        {"role": "user", "content": f"{INSTRUCTION}\n\n{EXAMPLE}"},
        {"role": "assistant", "content": f"<action>{EXAMPLE}</action>"},
        {"role": "user", "content": f"Now these words.\n\n{message}"},
    ]
