"""Whole small runs on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import skyrl_gym
from integrations.openenv.entrypoints.main_openenv import OpenEnvExp, OpenEnvRunConfig
from integrations.openenv.env import register_openenv
from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.metrics import read_metrics
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model


def arguments(folder: Path, run: str, data: str) -> list[str]:
    return [
        f"data.train_data=['{folder}/{data}']",
        f"trainer.policy.model.path={folder}/model",
        f"trainer.ckpt_path={folder}/{run}",
        f"trainer.export_path={folder}/{run}/exports",
        "trainer.device=cuda",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.algorithm.use_kl_loss=false",
        "trainer.algorithm.use_entropy_loss=true",  # a gradient even where nothing is rewarded
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.eval_interval=-1",
        "trainer.eval_before_train=false",
        "trainer.hf_save_interval=2",
        "generator.n_samples_per_prompt=4",
        "generator.sampling_params.max_generate_length=24",
    ]


@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
def test_two_steps_on_echo_env(device: torch.device, tmp_path: Path, bf16: bool) -> None:
    save_tiny_model(tmp_path / "model")
    train, _ = dataset_rows("echo_env", 4, 0, seed=0)
    write_parquet(train, tmp_path / "train.parquet")
    register_openenv()
    more = ["environment.openenv.runtime=local", f"trainer.bf16={str(bf16).lower()}"]
    words = [*arguments(tmp_path, "run", "train.parquet"), *more]
    try:
        assert main(words, experiment=OpenEnvExp, root=OpenEnvRunConfig) == 0
    finally:
        skyrl_gym.envs.deregister("openenv")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["policy/rollout_train_logprobs_abs_diff_mean"] < (0.1 if bf16 else 1e-3)


def test_deterministic_runs_end_with_the_same_bits(device: torch.device, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("even", EvenEnv)
    more = ["environment.env_class=even", "trainer.deterministic=true", "generator.max_turns=2"]
    try:
        for run in ("first", "second"):
            assert main([*arguments(tmp_path, run, "data.jsonl"), *more]) == 0
    finally:
        skyrl_gym.envs.deregister("even")
        torch.use_deterministic_algorithms(False)
    first, second = ([*(tmp_path / run).rglob("*.safetensors")] for run in ("first", "second"))
    assert first
    for ours, theirs in zip(sorted(first), sorted(second), strict=True):
        weights, same = load_file(ours), load_file(theirs)
        assert all(torch.equal(weights[name], same[name]) for name in weights)
