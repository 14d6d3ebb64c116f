"""TRL: the same task, samples and learning rate, up to the first step whose samples earn enough."""

from __future__ import annotations

import json
import time
from typing import Any

from transformers import TrainerCallback

from tests.benchmarks.workers.echo import rewards, rows
from tests.benchmarks.workers.trl import GRPOTrainer, make_trainer
from tests.benchmarks.workers.turns import NoMoreTurns, settings


class UntilLearned(TrainerCallback):
    """Ends the training as soon as a step's mean reward is enough."""

    def __init__(self, enough: float) -> None:
        self._enough = enough
        self._began: float | None = None
        self._end = 0.0
        self._rewards: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._began or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._end = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs is None or "reward" not in logs:
            return
        self._rewards.append(float(logs["reward"]))
        if self._rewards[-1] >= self._enough:
            assert self._began is not None
            print(json.dumps({"seconds": self._end - self._began, "rewards": self._rewards}), flush=True)
            raise NoMoreTurns


def main() -> None:
    asked = settings()
    trainer = make_trainer(asked, rows(), rewards, GRPOTrainer, exact_length=False)
    trainer.add_callback(UntilLearned(asked["reward"]))
    try:
        trainer.train()
    except NoMoreTurns:
        return


if __name__ == "__main__":
    main()
