"""Ours: the training run of run_openenv.sh, up to the first step whose samples earn enough."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, ClassVar

from integrations.openenv.entrypoints.main_openenv import OpenEnvExp
from tests.benchmarks.workers.openenv import train
from tests.benchmarks.workers.turns import NoMoreTurns, settings

OVERRIDES = (
    "trainer.eval_interval=-1",
    "trainer.eval_before_train=false",
    "trainer.ckpt_interval=-1",
    "trainer.epochs=4",
)


class Learn(OpenEnvExp):
    """The experiment, which ends as soon as the task is learned."""

    enough: ClassVar[float]  # mean reward of a step's episodes

    def get_trainer(self, run: Any) -> Any:
        trainer = super().get_trainer(run)
        step, rewards, began = trainer.timed_step, [], []

        async def timed_step() -> dict[str, float]:
            began.append(time.perf_counter())
            metrics = await step()
            rewards.append(metrics["reward/avg_raw_reward"])
            if rewards[-1] >= self.enough:
                seconds = time.perf_counter() - began[0]
                print(json.dumps({"seconds": seconds, "rewards": rewards}), flush=True)
                raise NoMoreTurns
            return metrics

        trainer.timed_step = timed_step
        return trainer


def main() -> int:
    asked = settings()
    Learn.enough = asked["reward"]
    try:
        return train(Learn, [*OVERRIDES, f"trainer.seed={asked['seed']}"])
    except NoMoreTurns:
        return 0


if __name__ == "__main__":
    sys.exit(main())
