"""What test_sleep.py runs in a process of its own: twenty turns of a vLLM engine and a learner on one GPU."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from skyrl_train.policy.memory_plan import ASLEEP_BYTES, GIB
from skyrl_train.weights.shared_memory import SharedMemoryWeights, proof_ids_of
from tests.skyrl_train.engine.conftest import ask
from tests.skyrl_train.engine.vllm.conftest import learner_of, policy_of, started
from tests.tiny_models import tiny_tokenizer

SHARE, NUM_TURNS = 0.5, 20


async def main() -> None:
    free_before, total = torch.cuda.mem_get_info()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"enable_sleep_mode": True, "gpu_memory_utilization": SHARE}
        engine = await started(Path(folder), tie_word_embeddings=True, **settings)
    weights = SharedMemoryWeights(proof_ids_of(tiny_tokenizer()), torch.float32, takes_turns=True)
    await weights.push(learner_of(policy_of(0, tie_word_embeddings=True), 0), engine)
    held = []
    for version in range(1, NUM_TURNS + 1):
        started_at = time.monotonic()
        await weights.before_update(engine)
        asleep_s = time.monotonic() - started_at
        free_asleep, _ = torch.cuda.mem_get_info()
        held.append(free_before - free_asleep)
        learners = torch.ones(int(0.4 * total), dtype=torch.uint8, device="cuda")  # the memory is the learner's now
        del learners
        torch.cuda.empty_cache()
        await weights.push(learner_of(policy_of(version, tie_word_embeddings=True), version), engine)
        assert weights.metrics["weights/max_logprob_difference"] < 1e-3
        completion = await engine.generate(ask("a", seed=version))
        assert completion.policy_version == version
    await engine.close()
    print(
        f"asleep it held {held[0] / GIB:.2f} GiB, {held[-1] / GIB:.2f} after {NUM_TURNS} turns; the last time it fell"
    )
    print(f"asleep in {asleep_s:.2f} s, and woke, took the weights and proved them in", weights.metrics)
    assert max(held) < ASLEEP_BYTES, "the memory plan counts on less"
    assert held[-1] - held[0] < 0.1 * GIB, "it forgets memory"


if __name__ == "__main__":
    asyncio.run(main())
