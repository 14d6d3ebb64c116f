"""The benchmarks' own workers do their work (on a tiny model), and what is reported of it adds up."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory, Turn
from tests.benchmarks import gpu
from tests.benchmarks.comparison import Comparison
from tests.benchmarks.run_openenv import variables
from tests.benchmarks.side_by_side import arguments
from tests.benchmarks.update import useful_tokens
from tests.benchmarks.workers import ours_multi_turn, ours_rollout, ours_update
from tests.benchmarks.workers.echo import reward
from tests.benchmarks.workers.prompts import prompts
from tests.tiny_models import save_tiny_model, tiny_policy, tiny_tokenizer


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    model = save_tiny_model(tmp_path / "model")
    return {
        "model": str(model),
        "folder": str(tmp_path),
        "num_prompts": 2,
        "samples": 3,
        "tokens": 4,
        "prompt_tokens": 40,
        "token_budget": 100,
        "turns": 2,
    }


def test_a_prompt_has_the_length_that_was_asked_for():
    assert [len(ids) for ids in prompts(tiny_tokenizer(), 3, 61)] == [61, 61, 61]


def test_a_rollout_samples_every_token_it_is_asked_for(settings: dict[str, Any]):
    assert ours_rollout.prepare(settings)() == {"tokens": 2 * 3 * 4}


def test_an_update_reports_its_gradient_and_memory(settings: dict[str, Any]):
    facts = ours_update.prepare(settings)()
    assert facts["grad_norm"] > 0
    assert facts["peak_bytes"] > 1 << 20


def test_useful_tokens_count_a_groups_prompt_once(settings: dict[str, Any]):
    assert useful_tokens(settings) == 2 * 40 + 2 * 3 * 4


def test_episodes_of_several_turns_leave_the_engine_busy_for_a_share_of_the_time(settings: dict[str, Any]):
    facts = ours_multi_turn.prepare(settings)()
    assert facts["turns"] == 2 * 3 * 2
    assert facts["tokens"] == 2 * 3 * 2 * 4
    assert 0 < facts["busy_share"] < 1
    assert facts["prompt_tokens"] >= facts["least_prompt_tokens"]


def test_the_fewest_prompt_tokens_are_the_prompt_once_and_what_came_after_each_reply():
    def episode(repetition: int) -> Trajectory:
        turns = [
            Turn([1, 2, 3], [4, 5], [-1.0, -1.0], 0.0, "", "stop", 0),
            Turn([1, 2, 3, 4, 5, 6, 7], [8], [-1.0], 0.0, "", "stop", 0),
        ]
        prompt = Prompt("0", [], "benchmark_patient")
        return Trajectory(prompt, repetition, 0, [], turns, EpisodeEnd.FINISHED)

    # 1 2 3 once; in each episode's second turn 5 (sampled last, never computed), 6 and 7
    group = Group(episode(0).prompt, [episode(0), episode(1)])
    assert ours_multi_turn.least_prompt_tokens([group]) == 3 + 2 * 3


def test_a_ratio_above_one_is_ours_ahead_in_rates_and_in_times():
    rate = Comparison("", "tokens/s", ours=60.0, peers={"trl": 20.0}, ceiling=120.0)
    seconds = Comparison("", "s", ours=2.0, peers={"trl": 5.0}, ceiling=1.0, is_time=True)
    assert (rate.ratios, rate.share) == ({"trl": 3.0}, 0.5)
    assert (seconds.ratios, seconds.share) == ({"trl": 2.5}, 0.5)


def test_the_gpu_benchmark_reports_rates_and_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = "gpu --json --device cpu --shape tiny --requests 1 9 --tokens 4 --prompt-tokens 40 80 --updates 2x2x40+4"
    monkeypatch.setattr("sys.argv", [*words.split(), "--rounds", "1", "--lora", "2"])
    gpu.main()
    [line] = capsys.readouterr().out.splitlines()
    outcome = json.loads(line)
    assert (outcome["device"], outcome["unit"]) == ("cpu", "tokens/s")
    rows = outcome["sampling"]
    assert [(row["requests"], row["prompt_tokens"]) for row in rows] == [(1, 40), (9, 40), (1, 80), (9, 80)]
    assert all(0 < row["share_of_ceiling"] < 1 for row in rows)
    assert outcome["ours"] == rows[-1]["ours"]
    assert 0 < outcome["updates"]["2x2x40+4"]["share_of_product_rate"] < 1


def test_the_ceilings_count_each_prompt_once_and_what_a_token_attends_to():
    policy = tiny_policy()
    size, peak = gpu.num_weights(policy), gpu.Peak(multiplied=1e6, read=1e6)
    # two groups: 2 * 2 * 40 prompt tokens computed; each of 4 steps multiplies 16 rows, slower than it reads
    assert peak.sampled(policy, 16, gpu.Work(2, 8, 40, 4)) == pytest.approx(
        16 * 4 / (2 * size * (2 * 40 + 16 * 4) / 1e6)
    )
    # one row: the weights, and keys and values of 8 numbers, 2 heads and 2 layers for 40 + 2 tokens, are read
    seconds = 2 * size * 40 / 1e6 + 4 * (2 * size + 2 * 2 * 2 * 2 * 8 * 42) / 1e6
    assert peak.sampled(policy, 1, gpu.Work(1, 8, 40, 4)) == pytest.approx(4 / seconds)
    # 40 + 2 * 4 tokens; the prompt's see 1 + ... + 40, each response's 41 to 44
    operations = 6 * size * 48 + 12 * 2 * 4 * 8 * (820 + 2 * 170)
    assert peak.share_of_update(policy, gpu.Work(1, 2, 40, 4), 2.0) == pytest.approx(operations / 2 / 1e6)


@pytest.mark.parametrize("words", ["--updates 16x8x128", "--step --lora 4", "--step --updates"])
def test_the_gpu_benchmark_refuses_what_it_cannot_time(monkeypatch: pytest.MonkeyPatch, words: str):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_the_gpu_benchmark_refuses_a_machine_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no CUDA GPU on this machine; --device cpu --shape tiny" in capsys.readouterr().err


def test_trls_reward_is_echo_envs():
    assert reward("Sure: <action>red lamp tree</action>", "red lamp tree") == 1.0
    assert reward("<action>red lamp tree", "red lamp tree") == 0.0
    assert reward("<action> </action>", "red lamp tree") == 0.0
    assert 0 < reward("<action>red lamp</action>", "red lamp tree") < 1


def test_the_stand_in_for_uv_starts_the_worker_in_the_trainers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = tmp_path / "real"
    real.mkdir()
    (real / "uv").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (real / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{real}:/usr/bin:/bin")
    variables("ours_learn", tmp_path, "")
    words = ["run", "python", "-m", "integrations.openenv.entrypoints.main_openenv", "data.train_data=['a b']"]
    said = subprocess.run([tmp_path / "bin" / "uv", *words], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [*words[:3], "tests.benchmarks.workers.ours_learn", "data.train_data=['a b']"]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_a_number_of_rounds_or_tokens_that_cannot_be_is_refused(value: str, capsys: pytest.CaptureFixture[str]):
    parser = arguments("Times a thing.\n\nuv run it", tokens=64)
    for key in ("rounds", "tokens"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--{key}={value}"])
        assert f"argument --{key}: '{value}' is no whole number of at least 1" in capsys.readouterr().err
    chosen = parser.parse_args([])
    assert (chosen.rounds, chosen.tokens) == (5, 64)
    assert "\n\nuv run it\n" in parser.format_help()
