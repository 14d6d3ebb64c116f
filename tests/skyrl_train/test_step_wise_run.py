"""A run whose template shortens earlier replies: turns are samples, records are whole, and it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.advantages import advantages_path, read_advantages
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.fakes import EvenEnv
from tests.tiny_models import CHATML, save_tiny_model

SHORTENED = "(message['content'][:4] if message['role'] == 'assistant' else message['content'])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("step_wise")
    save_tiny_model(folder / "model")
    (folder / "shortens.jinja").write_text(CHATML.replace("message['content']", SHORTENED))
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("even", EvenEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)
    skyrl_gym.envs.deregister("even")


def run(folder: Path, name: str, *more: str) -> list[dict[str, float]]:
    settings = [
        f"data.train_data=['{folder}/data.jsonl']",
        "data.val_data=[]",
        f"trainer.policy.model.path={folder}/model",
        f"trainer.ckpt_path={folder}/{name}",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "environment.env_class=even",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=1",
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.algorithm.dynamic_sampling.type=filter",
        "trainer.algorithm.loss_reduction=sequence_mean",
        "trainer.ckpt_interval=1",
        "trainer.max_ckpts_to_keep=-1",
        "generator.n_samples_per_prompt=3",
        "generator.sampling_params.max_generate_length=12",
        "generator.chat_template.source=file",
        f"generator.chat_template.name_or_path={folder}/shortens.jinja",
        *more,
    ]
    assert main(settings) == 0
    return [line for line in read_metrics(folder / name / "metrics.jsonl") if line["step"] > 0]


def test_a_run_with_rewritten_histories_keeps_its_records_and_goes_on_where_it_stood(folder, capsys):
    assert main([f"trainer.policy.model.path={folder}/model", f"data.train_data=['{folder}/data.jsonl']",
                 "generator.chat_template.source=file", "trainer.device=cpu",
                 f"generator.chat_template.name_or_path={folder}/shortens.jinja"]) == 2  # fmt: skip
    assert "generator.step_wise_trajectories=true" in capsys.readouterr().err

    step_wise = "generator.step_wise_trajectories=true"
    steps = run(folder, "whole", step_wise)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert 1.5 < line["generate/samples_per_episode"] <= 2.0  # a reply of four letters is printed as it is
        assert line["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4  # what the engine read is what is trained
        assert line["loss/num_trained_tokens"] > 0
    for step, path in trajectory_files(folder / "whole", "train").items():
        for episode in read_trajectories(path):
            rows = read_advantages(advantages_path(folder / "whole", step), episode)
            assert len(episode.turns) == 2
            for segment, row in zip(episode.segments, rows, strict=True):
                assert row is None or len(row) == len(segment.ids)
    assert (folder / "whole" / "report.html").stat().st_size > 10_000

    resumed = run(
        folder, "resumed", step_wise, "trainer.resume_mode=from_path",
        f"trainer.resume_path={folder}/whole/global_step_2",
    )  # fmt: skip
    for key in ("policy/grad_norm", "reward/avg_raw_reward", "loss/num_trained_tokens", "generate/samples_per_episode"):
        assert [line[key] for line in resumed] == [line[key] for line in steps[2:]], key
