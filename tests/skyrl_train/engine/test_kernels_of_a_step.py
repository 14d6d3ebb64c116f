"""How many kernels a decoding step launches on a GPU, counted on the meta device at the size of Qwen2.5-0.5B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl_train.engine.torch import paged_cache
from skyrl_train.engine.torch.cuda_graphs import Bucket, DecodingStep, NothingFromTheHost
from skyrl_train.engine.torch.paged_cache import PagedCache
from skyrl_train.policy import blocks
from tests.skyrl_train.learner.on_meta import FusedOpsOnMeta, meta_module, policy_of


class Launches(TorchDispatchMode):
    """Counts operations that compute; views and new memory launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        self.number += not is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


class CountedOps(FusedOpsOnMeta):
    """What the fused kernels allocate, each counted as the one launch that it is."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        self._launches.number += 1
        return super().norm(x, weight, epsilon)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        self._launches.number += 1
        return super().add_norm(x, residual, weight, epsilon)

    def rotate(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        self._launches.number += 1
        return super().rotate(query, key, cosine, sine)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        self._launches.number += 1
        return super().gate(gate, up)


@torch.inference_mode()
def test_a_decoding_step_of_qwen_0_5b_launches_at_most_420_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()

    def attend(query: Tensor, *_: Any, **__: Any) -> Tensor:
        launches.number += 2  # parts of the keys, then their sum
        return torch.empty_like(query)

    def write(*_: Any) -> None:
        launches.number += 1

    monkeypatch.setattr(blocks, "ops_for", lambda device, dtype: CountedOps(launches))
    monkeypatch.setattr(paged_cache, "decode_attention", attend)
    monkeypatch.setattr(paged_cache, "write_rows", write)
    policy = policy_of(meta_module("qwen2.5-0.5b"), gradient_checkpointing=False)
    cache = PagedCache(policy, max_slots=256, max_length=4096, max_bytes=2**33, evict=lambda: False)
    step = DecodingStep(policy, cache, Bucket(256, cache.longest_span))
    with launches, NothingFromTheHost():
        hidden = step.compute()
    assert hidden.shape == (256, 896)
    print(f"{launches.number} kernels")
    assert 24 * 14 <= launches.number <= 420
