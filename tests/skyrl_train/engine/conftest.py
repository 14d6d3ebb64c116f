"""One engine per test, closed whatever happens, and requests in one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch

from skyrl_train.engine.base import Completion, Engine, Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine, forward
from skyrl_train.policy.model import Policy
from tests.pretend_cuda import PretendCuda
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


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the test run on a pretended GPU, where nothing but the recording of graphs is left out."""
    from tests.skyrl_train.engine.test_cuda_graphs import again

    monkeypatch.setattr(forward, "CudaGraphs", lambda device: again)
    with torch.no_grad(), PretendCuda():
        yield


@pytest.fixture(scope="module")
def policy_on_cuda() -> Policy:
    with torch.no_grad(), PretendCuda():
        return tiny_policy(device="cuda")


def ask(prompt: str | list[int], session_id: str = "s", **sampling: Any) -> Request:
    ids = tiny_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
    settings: dict[str, Any] = {"max_tokens": 12} | sampling
    return Request(ids, SamplingParams(**settings), session_id)


async def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(request) for request in requests))


async def until_step(engine: TorchEngine, step: int) -> None:
    while engine.stats().steps < step:  # noqa: ASYNC110 (the thread tells nobody about its steps)
        await asyncio.sleep(0)
