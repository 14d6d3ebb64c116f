"""Ours: the trainer's own loop, which waits before each step for the benchmark's request."""

from __future__ import annotations

from typing import Any

from skyrl_train.entrypoints.main_base import BasePPOExp
from tests.benchmarks.workers.environments import register_environments
from tests.benchmarks.workers.ours import configuration
from tests.benchmarks.workers.turns import NoMoreTurns, Turns, settings


class InTurns(BasePPOExp):
    """A training run with one request per step."""

    def build_trainer(self, run: Any) -> Any:
        trainer, turns = super().build_trainer(run), Turns()
        step = trainer.timed_step

        async def timed_step() -> dict[str, float]:
            turns.begin()
            metrics = await step()
            turns.end()
            turns.tell({name.removeprefix("timing/"): seconds for name, seconds in trainer.timings.items()})
            return metrics

        trainer.timed_step = timed_step
        return trainer


def main() -> None:
    register_environments()
    config = configuration(settings(), "benchmark_vowels", "trainer.epochs=100000")
    try:
        InTurns(config).run()
    except NoMoreTurns:
        return


if __name__ == "__main__":
    main()
