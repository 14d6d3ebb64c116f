"""A small run with frozen weights in 4 bits and moments in 8: it trains, resumes bit for bit, and exports."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from skyrl_train.learner.saved import SavedLearner
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.model_folder import trained_module
from skyrl_train.run.saved_run import read_run
from tests.skyrl_train.test_lora_run import train

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: uv sync --inexact --extra quantized")
KEYS = [
    "trainer.policy.model.load_in_4bit=true",
    "trainer.policy.model.lora.rank=64",  # an adapter of 4,096 numbers and more has moments of 8 bits
    "trainer.policy.optimizer_config.optim=adamw_8bit",
]


def test_a_run_in_few_bits_trains_resumes_and_exports(given, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(given, whole, *KEYS, "trainer.epochs=2") == 0
    for epochs in (1, 2):
        assert train(given, cut, *KEYS, f"trainer.epochs={epochs}") == 0
    lines = read_metrics(whole / "metrics.jsonl")
    assert all(line["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4 for line in lines)
    assert all(line["policy/grad_norm"] > 0.01 for line in lines)
    ours, theirs = (SavedLearner(folder / "global_step_4/policy") for folder in (cut, whole))
    assert {name.partition("/")[0] for name in theirs.shapes} > {"exp_avg_scales", "exp_avg_sq_scales"}
    for name in theirs.shapes:
        assert torch.equal(ours.whole(name), theirs.whole(name)), name
    exported = AutoModelForCausalLM.from_pretrained(whole / "exports" / "global_step_4" / "policy")
    layer = trained_module(read_run(whole), torch.float32).get_submodule("model.layers.0.mlp.up_proj")
    merged = layer.weight + layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(exported.get_submodule("model.layers.0.mlp.up_proj").weight, merged)
