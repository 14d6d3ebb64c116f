"""Learner ranks and vLLM engines on GPUs, in processes of their own. NCCL sums the gradients where there are two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyrl_train.run.metrics import read_metrics
from tests.skyrl_train.cluster.runs import NUM_STEPS, TWO, family_after_step, nothing_is_left, start, write_given

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
pytest.importorskip("vllm", reason="needs vLLM: uv sync --inexact --extra vllm")
ON_GPU = ["trainer.device=cuda", "generator.backend=vllm", "generator.max_num_seqs=16"]
SHARED = ["generator.gpu_memory_utilization=0.3"]  # the rest is the learner's


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_gpus", "overrides"),
    [
        (1, SHARED),
        (1, [*SHARED, "trainer.strategy=fsdp2"]),
        (2, [*SHARED, *TWO]),
        (1, [*SHARED, "generator.weight_sync_backend=shared_memory"]),
        (2, ["trainer.placement.colocate_all=false", "generator.weight_sync_backend=shared_memory"]),
        (2, ["trainer.placement.colocate_all=false"]),
    ],
    ids=[
        "one process and vLLM",
        "one rank and vLLM",
        "two ranks and two engines",
        "one process and vLLM, which maps a file",
        "learner and engine apart, and a file between them",
        "apart, and NCCL brings the weights",
    ],
)
@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
def test_vllm_engines_train_and_leave_nothing(
    device: torch.device, num_gpus: int, overrides: list[str], bf16: bool, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, and {torch.cuda.device_count()} are here")
    process = start(write_given(tmp_path), *ON_GPU, *overrides, f"trainer.bf16={str(bf16).lower()}")
    family = family_after_step(1, tmp_path / "run", process)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == NUM_STEPS
    for line in lines[1:]:
        assert line["policy/grad_norm"] > 0
        assert line["weights/mean_logprob_difference"] < (0.3 if bf16 else 1e-3)
    print({key: value for key, value in lines[-1].items() if key.startswith(("weights/", "timing/"))})
    assert nothing_is_left(family)
