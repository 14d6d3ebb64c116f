"""A whole run with an environment that breaks: it goes on without the broken episodes, or ends in five lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from skyrl_train.types import EpisodeEnd
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model


class WrongCodeEnv(EvenEnv):
    def step(self, action: str) -> Any:
        return no_such_name  # noqa: F821  # ty: ignore[unresolved-reference]


class NowAndThenNanEnv(EvenEnv):
    """Every third step pays NaN."""

    steps = 0

    def step(self, action: str) -> Any:
        NowAndThenNanEnv.steps += 1
        return super().step(action) | ({"reward": math.nan} if self.steps % 3 == 0 else {})

    @staticmethod
    def aggregate_metrics(metrics: list[dict[str, Any]]) -> Any:
        raise SystemExit("a mistake of its author")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}], "max_turns": None, "seed": None} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, env: type) -> int:
    register("broken", env)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    status = main(
        [
            f"data.train_data=['{folder}/data.jsonl']",
            "data.val_data=[]",
            f"trainer.policy.model.path={folder}/model",
            f"trainer.ckpt_path={folder}/{env.__name__}",
            f"trainer.export_path={folder}/exports",
            "trainer.device=cpu",
            "trainer.bf16=false",
            "trainer.eval_interval=-1",
            "environment.env_class=broken",
            "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=4",
            "generator.n_samples_per_prompt=12",
            "generator.max_turns=2",
            "generator.sampling_params.max_generate_length=8",
        ]
    )
    torch.set_num_threads(threads)
    skyrl_gym.envs.deregister("broken")
    return status


def test_a_programming_error_ends_the_run_with_five_lines_and_status_1(folder, capfd):
    assert run(folder, WrongCodeEnv) == 1
    seen = capfd.readouterr()
    assert "Traceback" not in seen.out + seen.err
    lines = [line for line in seen.err.splitlines() + seen.out.splitlines() if "NameError" in line or "stopped" in line]
    end = [line for line in seen.err.splitlines() if "INFO" not in line and "shards" not in line]
    warnings = [line for line in seen.out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2, warnings  # the first failure, and how many more like it
    assert "and 47 more like it" in warnings[1]
    assert len(end) == 3, end
    assert end[0].startswith("stopped: all 48 episodes of a round failed in their environments, in 48 attempts.")
    assert "NameError: name 'no_such_name' is not defined" in end[1]
    assert "test_broken_environment.py:" in end[1]
    assert end[2].endswith("the same command begins again")
    assert len(lines) == 4


def test_a_nan_now_and_then_costs_its_episode_an_attempt_and_nothing_else(folder):
    assert run(folder, NowAndThenNanEnv) == 0
    [line] = read_metrics(folder / "NowAndThenNanEnv" / "metrics.jsonl")[-1:]
    assert line["generate/retries"] > 0
    assert 0.0 <= line["reward/avg_raw_reward"] <= 2.0
    assert 0.0 < line["policy/grad_norm"] < math.inf
    [path] = trajectory_files(folder / "NowAndThenNanEnv", "train").values()
    episodes = read_trajectories(path)
    failed = [episode for episode in episodes if episode.end is EpisodeEnd.ENV_FAILURE]
    assert len(failed) == line["generate/env_failures"]
    assert all(
        episode.failure == "broken: wrong answer of step: reward must be a finite float, not nan" for episode in failed
    )
    assert all(math.isfinite(episode.reward) for episode in episodes)
