"""Environments that are scored by comparing the observation with a known answer: echo_env, coding_env."""

from __future__ import annotations

from abc import abstractmethod
from random import Random
from typing import Any

from integrations.openenv.catalog.entry import Answer, CatalogEntry, Task, Translator
from integrations.openenv.client.session import StepResult


class ScoredEntry(CatalogEntry):
    """Entry whose turns pay by how much they exceed the best score so far: an episode earns its best score."""

    def translator(self, task: Task, options: Any) -> Translator:
        return ScoredTranslator(self, task)

    @abstractmethod
    def parse(self, text: str) -> dict[str, Any]:
        """Return the fields of the action that the text of an <action> tag means; InvalidAction if it means none."""

    @abstractmethod
    def observation_text(self, observation: dict[str, Any]) -> str:
        """Return the text of an observation for the model; "" if there is none."""

    @abstractmethod
    def score(self, ground_truth: str, observation: dict[str, Any]) -> float:
        """Return how well the task is solved, in [0, 1]; 1.0 only if it is solved."""


class ScoredTranslator(Translator):
    gold_reward = 1.0

    def __init__(self, entry: ScoredEntry, task: Task) -> None:
        self.entry = entry
        self.task = task
        self.best_score = 0.0

    def first_text(self, first: StepResult) -> str:
        return self.entry.observation_text(first.observation)

    def action(self, text: str) -> dict[str, Any]:
        return self.entry.parse(text)

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        score = self.entry.score(self.task.ground_truth, result.observation)
        gain, self.best_score = max(score - self.best_score, 0.0), max(score, self.best_score)
        self.success = self.best_score >= 1.0
        text = self.entry.observation_text(result.observation)
        ended = score >= 1.0 or result.done
        if not ended and not last_turn:
            text = f"{text}\nThat is not right yet. Try again.".lstrip()
        return Answer(text, gain, ended)

    def gold_action(self) -> str | None:
        return self.task.solution

    def random_action(self, random: Random) -> str | None:
        """Return the solution of another, random task."""
        return self.entry.tasks(random, 1, self.entry.read_options({}))[0].solution

    def metrics(self) -> dict[str, float]:
        return {"score": self.best_score}
