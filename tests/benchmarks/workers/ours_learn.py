"""Ours: the training run of run_openenv.sh, which reports what each step's episodes earned."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from integrations.openenv.entrypoints.main_openenv import OpenEnvExp
from tests.benchmarks.workers.openenv import train
from tests.benchmarks.workers.turns import settings

OVERRIDES = (
    "trainer.eval_interval=-1",
    "trainer.eval_before_train=false",
    "trainer.ckpt_interval=-1",
    "trainer.epochs=4",
)


class Learn(OpenEnvExp):
    """An experiment that reports after every step."""

    def build_trainer(self, run: Any) -> Any:
        trainer = super().build_trainer(run)
        step, began = trainer.timed_step, []

        async def timed_step() -> dict[str, float]:
            began.append(time.perf_counter())
            metrics = await step()
            seconds = time.perf_counter() - began[0]
            print(json.dumps({"seconds": seconds, "reward": metrics["reward/avg_raw_reward"]}), flush=True)
            return metrics

        trainer.timed_step = timed_step
        return trainer


if __name__ == "__main__":
    sys.exit(train(Learn, [*OVERRIDES, f"trainer.seed={settings()['seed']}"]))
