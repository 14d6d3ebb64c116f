"""Ours: the engine of a training run samples one group per prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any

from skyrl_train.engine.base import Engine, Request, SamplingParams
from skyrl_train.entrypoints.main_base import BasePPOExp
from tests.benchmarks.workers.ours import configuration, in_compute_thread
from tests.benchmarks.workers.prompts import prompts
from tests.benchmarks.workers.turns import serve


def prepare(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    estimator = "trainer.algorithm.advantage_estimator=reinforce++"  # it is content with one sample of a prompt
    experiment = BasePPOExp(configuration(settings, "arithmetic", estimator))
    policy = in_compute_thread(experiment.get_policy)
    engine: Engine = in_compute_thread(experiment.get_engine, policy)
    asked = prompts(experiment.tokenizer, settings["num_prompts"], settings["prompt_tokens"])
    num_tokens, calls = settings["tokens"], count()

    async def rollout() -> dict[str, Any]:
        call = next(calls)
        requests = [
            Request(
                ids,
                SamplingParams(num_tokens, min_tokens=num_tokens, seed=1000 * call + 100 * i + j),
                f"{call}-{i}-{j}",
            )
            for i, ids in enumerate(asked)
            for j in range(settings["samples"])
        ]
        completions = await asyncio.gather(*map(engine.generate, requests))
        await asyncio.gather(*(engine.forget(request.session_id) for request in requests))
        return {"tokens": sum(len(completion.response_ids) for completion in completions)}

    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(rollout())


if __name__ == "__main__":
    serve(prepare)
