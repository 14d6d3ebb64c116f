"""TRL: the same task, samples and learning rate; reports what each step's samples earned."""

from __future__ import annotations

import json
import time
from typing import Any

from transformers import TrainerCallback

from tests.benchmarks.workers.echo import rewards, rows
from tests.benchmarks.workers.trl import GRPOTrainer, make_trainer
from tests.benchmarks.workers.turns import settings


class Rewards(TrainerCallback):
    """Callback that reports after every step."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._began or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self._began is not None
        self._seconds = time.perf_counter() - self._began

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs is not None and "reward" in logs:
            print(json.dumps({"seconds": self._seconds, "reward": float(logs["reward"])}), flush=True)


def main() -> None:
    trainer = make_trainer(settings(), rows(), rewards, GRPOTrainer, exact_length=False)
    trainer.add_callback(Rewards())
    trainer.train()


if __name__ == "__main__":
    main()
