"""Ours: one update of the learner on given samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.entrypoints.main_base import BasePPOExp
from tests.benchmarks.workers.ours import configuration, in_compute_thread
from tests.benchmarks.workers.samples import batch
from tests.benchmarks.workers.turns import serve


def prepare(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    config = configuration(settings, "arithmetic")
    experiment = BasePPOExp(config)
    policy = in_compute_thread(experiment.get_policy)
    learner = in_compute_thread(experiment.get_learner, policy)
    samples = batch(experiment.tokenizer, settings)

    def update() -> dict[str, Any]:
        ready = add_advantages(learner.add_logprobs(samples), config.trainer.algorithm)
        metrics = learner.update(ready)
        return {"grad_norm": metrics["policy/grad_norm"], "peak_bytes": peak_memory()}

    return lambda: in_compute_thread(update)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    serve(prepare)
