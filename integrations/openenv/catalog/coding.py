"""coding_env: write a small Python program that prints a given result. The environment runs it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random
from typing import Any, ClassVar, Self

from integrations.openenv.catalog.entry import InvalidAction, Messages, Task
from integrations.openenv.catalog.options import NoOptions
from integrations.openenv.catalog.scored import ScoredEntry
from integrations.openenv.catalog.words import WORDS

SHOWN_CHARS = 1000  # of stdout and of stderr, in what the model reads
MAX_COMPARED_CHARS = 200  # more than any expected output
FENCE = re.compile(r"\A```[a-zA-Z0-9]*[ \t]*\n(.*?)\n?```\Z", re.DOTALL)

RUNS_WITH_ERROR, RUNS, CLOSE = 0.1, 0.2, 0.6  # rewards: an error; no error; no error and nearly the right output


@dataclass(frozen=True, slots=True)
class CodeAction:
    """The action: a program to run."""

    code: str

    def fields(self) -> dict[str, Any]:
        return {"code": self.code}


@dataclass(frozen=True, slots=True)
class CodeObservation:
    """An observation: the program's output. The interpreter adds the value of the last statement, if any, to stdout."""

    stdout: str
    stderr: str
    exit_code: int

    @classmethod
    def from_fields(cls, observation: dict[str, Any]) -> Self:
        exit_code = observation.get("exit_code")
        return cls(
            stdout=str(observation.get("stdout") or ""),
            stderr=str(observation.get("stderr") or ""),
            exit_code=exit_code if isinstance(exit_code, int) else 1,
        )


class CodingEntry(ScoredEntry):
    """Small programs, judged by what they print. Imports that the server allows: math, re, random, itertools, ..."""

    name: ClassVar[str] = "coding_env"
    image: ClassVar[str] = "ghcr.io/meta-pytorch/openenv-coding-env:latest"
    server_module: ClassVar[str] = "integrations.openenv.servers.coding_env"

    def tasks(self, random: Random, num_tasks: int, options: NoOptions) -> list[Task]:
        tasks: dict[str, Task] = {}
        tries = 0
        while len(tasks) < num_tasks:
            tries += 1
            if tries > 20 * num_tasks:
                raise ValueError(f"coding_env: {num_tasks} different tasks are too many; {len(tasks)} were found")
            family = list(FAMILIES)[len(tasks) % len(FAMILIES)]
            request, solution, output = FAMILIES[family](random)
            tasks.setdefault(request, Task(_prompt(request), family, ground_truth=output, solution=solution))
        return list(tasks.values())

    def parse(self, text: str) -> dict[str, Any]:
        code = text.strip()
        fenced = FENCE.match(code)
        code = (fenced.group(1) if fenced else code).strip("\n")
        if not code.strip():
            raise InvalidAction("Your action is empty. Write Python code between <action> and </action>.")
        return CodeAction(code).fields()

    def observation_text(self, observation: dict[str, Any]) -> str:
        seen = CodeObservation.from_fields(observation)
        if seen.exit_code != 0:
            return f"The program failed:\n{_last(seen.stderr)}"
        return f"The program printed:\n{_last(seen.stdout)}" if seen.stdout else ""

    def score(self, ground_truth: str, observation: dict[str, Any]) -> float:
        """Return 1.0 for the expected output (except for white space at its end), 0.1 for an error.

        Any other output gets 0.2 to 0.6, by its similarity to the expected one.
        """
        seen = CodeObservation.from_fields(observation)
        if seen.exit_code != 0:
            return RUNS_WITH_ERROR
        printed = seen.stdout.rstrip()
        if printed == ground_truth.rstrip():
            return 1.0
        likeness = SequenceMatcher(None, ground_truth, printed[:MAX_COMPARED_CHARS], autojunk=False).ratio()
        return RUNS + (CLOSE - RUNS) * likeness


def _sum(random: Random) -> tuple[str, str, str]:
    numbers = random.sample(range(2, 100), 3)
    a, b, c = numbers
    return f"Print the sum of {a}, {b} and {c}.", f"print({a} + {b} + {c})", str(sum(numbers))


def _maximum(random: Random) -> tuple[str, str, str]:
    a, b = random.sample(range(11, 100), 2)
    return f"Print the maximum of {a} and {b}.", f"print(max({a}, {b}))", str(max(a, b))


def _square(random: Random) -> tuple[str, str, str]:
    a = random.randrange(11, 1000)
    return f"Print {a} squared.", f"print({a} ** 2)", str(a**2)


def _words(random: Random) -> tuple[str, str, str]:
    words = " ".join(random.sample(WORDS, 2))
    return f'Print "{words}".', f'print("{words}")', words


# Each draws a request, a program that solves it, and the output of that program.
FAMILIES: dict[str, Callable[[Random], tuple[str, str, str]]] = {
    "sum": _sum,
    "maximum": _maximum,
    "square": _square,
    "words": _words,
}


def _prompt(request: str) -> Messages:
    """Return the prompt: one example as earlier turns, then the task."""
    return [
        {"role": "system", "content": "You write one line of Python. The environment runs it."},
        {"role": "user", "content": "Print the sum of 4, 20 and 7."},
        {"role": "assistant", "content": "<action>print(4 + 20 + 7)</action>"},
        {"role": "user", "content": request},
    ]


def _last(text: str) -> str:
    """Return the end of a long text, because an error message comes last."""
    return text if len(text) <= SHOWN_CHARS else "..." + text[-SHOWN_CHARS:]
