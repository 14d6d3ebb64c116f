"""Ours: a round of the collector with episodes of several turns, and what the engine counted meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from itertools import count, pairwise
from typing import Any

from skyrl_train.engine.torch import TorchEngine
from skyrl_train.entrypoints.main_base import BasePPOExp
from skyrl_train.rollout.round import Round
from skyrl_train.rollout.sampling import sampling_params
from skyrl_train.types import Group
from tests.benchmarks.workers.environments import register_environments
from tests.benchmarks.workers.ours import configuration, in_compute_thread
from tests.benchmarks.workers.turns import serve


def prepare(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    register_environments()
    config = configuration(settings, "benchmark_patient", f"generator.max_turns={settings['turns']}")
    experiment = BasePPOExp(config)
    policy = in_compute_thread(experiment.get_policy)
    engine = in_compute_thread(experiment.get_engine, policy)
    assert isinstance(engine, TorchEngine)
    assert experiment.train_dataset is not None
    collector = experiment.get_collector(engine)
    prompts = list(experiment.train_dataset)
    loop, steps = asyncio.new_event_loop(), count(1)
    sampling = sampling_params(config.generator.sampling_params)

    def rollout() -> dict[str, Any]:
        asked = Round("train", next(steps), prompts, settings["samples"], sampling)
        before, began = engine.stats(), time.perf_counter()
        groups = loop.run_until_complete(collector.collect(asked))
        seconds, after = time.perf_counter() - began, engine.stats()
        return {
            "busy_share": (after.busy_seconds - before.busy_seconds) / seconds,
            "prompt_tokens": after.prompt_tokens_computed - before.prompt_tokens_computed,
            "least_prompt_tokens": least_prompt_tokens(groups),
            "tokens": after.tokens_sampled - before.tokens_sampled,
            "turns": sum(len(episode.turns) for group in groups for episode in group.trajectories),
        }

    return rollout


def least_prompt_tokens(groups: Iterable[Group]) -> int:
    """Return the fewest tokens to compute: a group's prompt once, and in every later turn the new tokens.

    Those are the observation and the last token of the reply, which was sampled but not computed yet.
    """
    total = 0
    for group in groups:
        total += len(group.trajectories[0].turns[0].prompt_ids)
        for episode in group.trajectories:
            for last, turn in pairwise(episode.turns):
                total += len(turn.prompt_ids) - (len(last.prompt_ids) + len(last.response_ids) - 1)
    return total


if __name__ == "__main__":
    serve(prepare)
