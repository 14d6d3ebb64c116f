"""One engine per test, closed whatever happens, and requests in one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from skyrl_train.engine.base import Completion, Engine, Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from tests.tiny_models import tiny_policy, tiny_tokenizer

MakeEngine = Callable[..., TorchEngine]


@pytest.fixture
async def make_engine() -> AsyncIterator[MakeEngine]:
    engines: list[TorchEngine] = []

    def make(policy=None, **options: Any) -> TorchEngine:
        settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 256} | options
        engines.append(TorchEngine(policy or tiny_policy(), tiny_tokenizer(), **settings))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


def ask(prompt: str | list[int], session_id: str = "s", **sampling: Any) -> Request:
    ids = tiny_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
    settings: dict[str, Any] = {"max_tokens": 12} | sampling
    return Request(ids, SamplingParams(**settings), session_id)


async def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(request) for request in requests))


async def until_step(engine: TorchEngine, step: int) -> None:
    while engine.stats().steps < step:  # noqa: ASYNC110 (the thread tells nobody about its steps)
        await asyncio.sleep(0)
