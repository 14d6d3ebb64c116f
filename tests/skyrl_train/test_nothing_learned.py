"""Whole small runs in which nothing can be learned: they go on, say once why, and count it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.metrics import read_metrics
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model

NUM_STEPS = 4


class SameForAllEnv(EvenEnv):
    """Pays every turn alike and can read none."""

    def step(self, action: str) -> Any:
        return super().step(action) | {"reward": 0.25}

    def get_metrics(self) -> dict[str, Any]:
        return {"invalid_actions": self.turns}


class LongFirstMessageEnv(EvenEnv):
    """Begins with more text than the policy may read."""

    def init(self, prompt: Any) -> Any:
        return [{"role": "user", "content": "x" * 400}], {}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b", "c", "d", "e" * 300)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(given: Path, folder: Path, env: type, *more: str) -> list[dict[str, Any]]:
    register("vain", env)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        status = main(
            [
                f"data.train_data=['{given}/data.jsonl']",
                "data.val_data=[]",
                f"trainer.policy.model.path={given}/model",
                f"trainer.ckpt_path={folder}",
                "trainer.device=cpu",
                "trainer.bf16=false",
                "trainer.eval_before_train=false",
                "trainer.max_prompt_length=200",
                "environment.env_class=vain",
                "trainer.train_batch_size=1",
                "trainer.policy_mini_batch_size=1",
                "trainer.algorithm.use_kl_loss=false",
                "generator.n_samples_per_prompt=3",
                "generator.max_turns=2",
                "generator.sampling_params.max_generate_length=4",
                *more,
            ]
        )
    finally:
        torch.set_num_threads(threads)
        skyrl_gym.envs.deregister("vain")
    assert status == 0
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["trainer/steps_without_learning"] for line in lines] == [1, 2, 3, 4]
    return lines


def the_warning(printed: str) -> str:
    [line] = [line for line in printed.splitlines() if "nothing could be learned for" in line]
    return line


def test_groups_of_equal_rewards(given, tmp_path, capfd):
    lines = run(given, tmp_path, SameForAllEnv)
    printed = capfd.readouterr()
    text = the_warning(printed.out + printed.err)
    assert "for 3 steps: all rewards of each group are equal (mean reward 0.5); 100% of actions were unreadable" in text
    assert "generator.sampling_params.temperature" in text
    assert all(line["reward/equal_group_share"] == line["generate/invalid_action_share"] == 1 for line in lines)
    assert "equal groups 100%   unreadable 100%" in printed.out
    assert "nothing could be learned in 4 of them" in printed.out


def test_a_filter_that_empties_every_batch(given, tmp_path, capfd):
    cut = "generator.sampling_params.min_tokens=4"  # every reply is cut: the engine may not end it sooner
    lines = run(given, tmp_path, EvenEnv, cut, "generator.apply_overlong_filtering=true")
    printed = capfd.readouterr()
    text = the_warning(printed.out + printed.err)
    assert "no sampled token is left in the loss (100% of episodes were ended by a length limit)" in text
    assert "100% of replies were cut by length" in text
    assert "max_generate_length" in text
    assert all(line["loss/num_trained_tokens"] == 0 for line in lines)
    assert lines[-1]["policy/policy_version"] == 0


def test_a_step_in_which_no_token_was_sampled_counts_and_makes_no_update(given, tmp_path, capfd):
    lines = run(given, tmp_path, LongFirstMessageEnv, "trainer.ckpt_interval=4")
    printed = capfd.readouterr()
    assert "no episode sampled a token. Try: generator.max_input_length" in the_warning(printed.out + printed.err)
    assert (tmp_path / "global_step_4").is_dir()
    assert all(line["generate/episodes_without_tokens"] == 3 for line in lines)
    assert not any("policy/policy_loss" in line for line in lines)
    assert all(line["data/num_dropped_prompts"] == 1 for line in lines)
