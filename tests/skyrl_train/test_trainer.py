"""A whole small run in this process: what is logged, what is kept, what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.policy.model import load_policy
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with two turns an episode, KL in the reward and two optimizer steps a step."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}], "data_source": f"s{i % 2}"} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("even", EvenEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    status = main(
        [
            f"data.train_data=['{folder}/data.jsonl']",
            f"data.val_data=['{folder}/data.jsonl']",
            f"trainer.policy.model.path={folder}/model",
            f"trainer.ckpt_path={folder}/run",
            f"trainer.export_path={folder}/run/exports",
            "trainer.device=cpu",
            "trainer.bf16=false",
            "environment.env_class=even",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=1",
            "trainer.algorithm.use_kl_loss=false",
            "trainer.algorithm.use_kl_in_reward=true",
            "trainer.algorithm.kl_ctrl.type=adaptive",
            "trainer.policy.optimizer_config.lr=1e-3",
            "trainer.hf_save_interval=4",
            "trainer.eval_interval=2",
            "generator.n_samples_per_prompt=4",
            "generator.max_turns=2",
            "generator.sampling_params.max_generate_length=8",
        ]
    )
    torch.set_num_threads(threads)
    skyrl_gym.envs.deregister("even")
    assert status == 0
    return folder / "run"


def test_every_step_logs_skyrls_metrics(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    wanted = {
        "reward/avg_pass_at_4", "reward/avg_raw_reward", "generate/avg_num_tokens", "policy/policy_loss",
        "policy/grad_norm", "policy/policy_entropy", "policy/policy_lr", "loss/avg_kl", "loss/kl_loss_coef",
        "loss/avg_raw_advantages", "trainer/epoch", "trainer/global_step", "timing/step", "timing/generate",
        "timing/policy_train", "timing/sync_weights", "policy/rollout_train_logprobs_abs_diff_turn_2",
    }  # fmt: skip
    for line in lines[1:]:
        assert wanted <= line.keys()
    evaluated = [line["step"] for line in lines if "eval/all/avg_score" in line]
    assert evaluated == [0, 2, 4]
    assert {"eval/s0/avg_score", "eval/s1/avg_score"} <= lines[0].keys()


def test_in_float32_the_engine_and_the_learner_agree_in_every_turn(finished):
    for line in read_metrics(finished / "metrics.jsonl")[1:]:
        assert line["policy/rollout_train_logprobs_abs_diff_turn_1"] < 1e-4
        assert line["policy/rollout_train_logprobs_abs_diff_turn_2"] < 1e-4


def test_each_mini_batch_is_an_optimizer_step_and_later_tokens_know_their_policy(finished):
    assert [line["policy/policy_version"] for line in read_metrics(finished / "metrics.jsonl")[1:]] == [2, 4, 6, 8]
    for step, path in trajectory_files(finished, "train").items():
        versions = {turn.policy_version for episode in read_trajectories(path) for turn in episode.turns}
        assert versions == {2 * (step - 1)}


def test_the_adaptive_kl_weight_moves(finished):
    weights = [line["loss/kl_loss_coef"] for line in read_metrics(finished / "metrics.jsonl")[1:]]
    assert len(set(weights)) == 4


def test_the_export_loads_as_a_model_and_the_report_and_summary_are_there(finished):
    load_policy(finished / "exports" / "global_step_4" / "policy", device="cpu", compute_dtype=torch.float32)
    assert (finished / "report.html").stat().st_size > 10_000
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["tokens"] == read_metrics(finished / "metrics.jsonl")[-1]["trainer/num_tokens"]
