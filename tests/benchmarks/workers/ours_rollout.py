"""Ours: the torch engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch

from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.learner.model import choose_device, load_policy, load_tokenizer
from tests.benchmarks.side_by_side import serve
from tests.benchmarks.workers.prompts import prompts


def prepare(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    tokenizer = load_tokenizer(settings["model"])
    policy = load_policy(settings["model"], device=choose_device("auto"), compute_dtype=torch.bfloat16)
    engine = TorchEngine(policy, tokenizer, max_num_seqs=1024, max_num_batched_tokens=8192)
    asked = prompts(tokenizer, settings["num_prompts"], settings["prompt_tokens"])
    num_tokens, calls = settings["tokens"], iter(range(10**9))

    async def rollout() -> int:
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
        return sum(len(completion.response_ids) for completion in completions)

    loop = asyncio.new_event_loop()
    return lambda: {"tokens": loop.run_until_complete(rollout())}


if __name__ == "__main__":
    serve(prepare)
