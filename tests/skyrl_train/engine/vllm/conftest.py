"""One vLLM engine for all tests of a session, and a torch engine beside it with the same weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from skyrl_train.config import TrainerConfig
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.engine.base import LoadingEngine
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.engine.vllm.settings import VllmSettings
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.model import Policy
from skyrl_train.weights.shared_memory import SharedMemoryWeights, proof_ids_of, read_shared
from tests.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_policy, tiny_tokenizer

ENDS = list(range(150, VOCAB_SIZE))  # so many tokens end a reply that tests see it happen
MODEL: dict[str, Any] = {"head_dim": 32}  # vLLM's attention on a CPU knows no smaller one
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 512}


class LoadingTorchEngine(TorchEngine):
    """The torch engine with weights of its own."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, tiny_tokenizer(), **LIMITS)
        self._policy = policy

    async def load_weights(self, shared: Any) -> None:
        with torch.no_grad():
            for name, tensor in read_shared(shared):
                self._policy.weights[name].copy_(tensor)
        await self.weights_changed(shared.version)

    async def sleep(self) -> None:
        await self.pause()

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        return learner_of(self._policy, 0).logprobs_of_tokens(ids)


def policy_of(seed: int, **config: Any) -> Policy:
    policy = tiny_policy(seed=seed, **(MODEL | config))
    policy.module.generation_config.eos_token_id = ENDS
    return policy


def learner_of(policy: Policy, version: int) -> TorchLearner:
    learner = TorchLearner(policy, TrainerConfig(algorithm=AlgorithmConfig(use_kl_loss=False)), num_training_steps=9)
    learner.policy_version = version
    return learner


def weights_of() -> SharedMemoryWeights:
    return SharedMemoryWeights(proof_ids_of(tiny_tokenizer()), torch.float32)


async def started(folder: Path, *, tie_word_embeddings: bool, **settings: Any) -> Any:
    """Start a vLLM engine of the tiny model. It needs a second file for the end-of-sequence tokens."""
    import skyrl_train.engine.vllm.arguments
    from skyrl_train.engine.vllm.engine import VllmEngine
    from tests.skyrl_train.engine.vllm.reversible import ReversibleWorker

    arguments: Any = skyrl_train.engine.vllm.arguments
    arguments.SharedWeightsWorker = ReversibleWorker
    save_tiny_model(folder, tie_word_embeddings=True, **MODEL)
    policy_of(0).module.generation_config.save_pretrained(folder)
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 64 << 20} | LIMITS | settings
    options["model_config_kwargs"] = {"tie_word_embeddings": tie_word_embeddings}
    return await VllmEngine.start(VllmSettings(folder, **options), tiny_tokenizer())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    engine = await started(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(loop_scope="session", params=["torch", "vllm"])
async def engine(request: pytest.FixtureRequest, vllm_engine: Any, policy: Policy) -> AsyncIterator[LoadingEngine]:
    """Each engine in turn, with the weights of `policy` as version 1."""
    engine = vllm_engine if request.param == "vllm" else LoadingTorchEngine(policy_of(9, tie_word_embeddings=True))
    await weights_of().push(learner_of(policy, 1), engine)
    yield engine
    if engine is not vllm_engine:
        await engine.close()


@pytest.fixture
def policy() -> Policy:
    return policy_of(3, tie_word_embeddings=True)
