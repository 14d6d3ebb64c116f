"""The game of the example, and its training as a user starts it, with a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from examples.nim.game import STARTS, NimEnv, prompt, random_game
from skyrl_gym import check_env
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_train.run.metrics import read_metrics
from tests.docs.pages import ROOT, typed_here
from tests.tiny_models import save_tiny_model


def played(env: NimEnv, moves: list[str]) -> list[Any]:
    env.init(prompt(env.sticks))
    return [env.step(move) for move in moves]


def test_whoever_leaves_a_multiple_of_four_wins_from_every_start():
    for sticks in STARTS:
        for seed in range(5):
            env = NimEnv({}, {"sticks": sticks, "seed": seed})
            outputs = played(env, env.gold_actions())
            assert [output["done"] for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert outputs[-1]["reward"] == 1.0
            assert outputs[-1]["observations"][0]["content"] == "You win."


@pytest.mark.parametrize("sticks", STARTS)
def test_any_other_first_move_loses_against_the_best_replies(sticks: int):
    for taken in {1, 2, 3} - {sticks % 4}:
        env = NimEnv({}, {"sticks": sticks})
        [output] = played(env, [f"take {taken}"])
        while not output["done"]:  # whatever is left is a multiple of four, so that no move wins any more
            assert env.sticks % 4 == 0
            output = env.step("take 2")
        assert output["reward"] == 0.0
        assert not env.won


@pytest.mark.parametrize("reply", ["", "take 4", "take 0", "I take 1", "take 1 take 2", "take 3", "2"])
def test_a_reply_that_is_no_move_loses(reply: str):
    env = NimEnv({}, {"sticks": 2})
    [output] = played(env, [reply])
    assert (output["done"], output["reward"], env.get_metrics()[INVALID_ACTIONS]) == (True, 0.0, 1)


@pytest.mark.parametrize("sticks", [1, 10])
def test_the_game_keeps_the_contract_of_environments(sticks: int):
    assert check_env(NimEnv, extras={"sticks": sticks, "max_turns": 15}).passed


def test_the_games_that_are_shown_hold_legal_moves_and_no_skill():
    random, good = Random(0), []
    for _ in range(300):
        messages = random_game(random)
        sticks = int(messages[1]["content"].split()[0])
        for message in messages[2:]:
            taken = int(re.findall(r"[123]", message["content"])[0])
            if message["role"] == "assistant":
                good.append(taken == sticks % 4)
            sticks -= taken
            assert sticks >= 0
        assert messages[-1]["role"] == "assistant"
        assert sticks <= 3, "the other player took the last ones, if there were any"
    assert 0.2 < sum(good) / len(good) < 0.45


def test_the_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = save_tiny_model(tmp_path / "model")
    typed_here(
        "python train.py", ROOT / "examples" / "nim", f"trainer.policy.model.path={model}", "trainer.device=cpu",
        "trainer.epochs=2", "trainer.eval_interval=2", "trainer.ckpt_interval=-1", "generator.n_samples_per_prompt=2",
    )  # fmt: skip
    folder = tmp_path / "ckpts" / "nim"
    lines = read_metrics(folder / "metrics.jsonl")
    assert sum("sft/loss" in line for line in lines) == 7
    assert [line["step"] for line in lines if "reward/avg_raw_reward" in line] == [8, 9]
    assert len((folder / "data" / "random_games.jsonl").read_text().splitlines()) == 7 * 32
    assert json.loads((folder / "summary.json").read_text())
