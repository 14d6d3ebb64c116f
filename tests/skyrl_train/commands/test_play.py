"""`play` of an environment of skyrl_gym, a class of the user's or a registered one: by hand, and by a model."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest

from integrations.openenv.__main__ import main
from skyrl_train.commands.main import main as skyrl
from skyrl_train.commands.sources import source
from tests.skyrl_train.commands.conftest import ENV

NAME = "game_of_test_play:Guess"
GAME = """
from skyrl_gym.envs.base_text_env import BaseTextEnv

class Guess(BaseTextEnv):
    def __init__(self, env_config, extras):
        super().__init__()
        self.word, self.seed, self.worth = extras["word"], extras["seed"], env_config.get("worth", 1)
        self.max_turns = extras.get("max_turns", 9)

    def step(self, action):
        self.turns += 1
        right = action.strip() == self.word
        over = right or self.turns >= self.max_turns
        answer = {"role": "user", "content": f"[red]not {self.seed}[/]\\x1b[31m"}
        reward = {"right": float(right * self.worth), "short": -0.5}
        told = {"observations": [] if right else [answer], "reward": reward, "done": over, "metadata": {}}
        return told | {"truncated": over and not right}

    def get_metrics(self):
        return {"by": "hand", "tries": 2}

def score(reply, turn):
    return 10.0 * turn
"""
ROWS = [{"prompt": f"Say {word}.", "word": word} for word in ("red", "blue", "green")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "game_of_test_play.py").write_text(GAME)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def typed(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_person_plays_a_class_of_the_current_folder(capsys, monkeypatch):
    typed(monkeypatch, "", "red", "?", "blue", "too late")
    assert main(["play", NAME, "--data", "rows.jsonl", "--seed", "4", "--option", "worth=3"]) == 0
    out = capsys.readouterr().out
    assert out.count("user: Say blue.") == 2, "the row that the seed picks, and again after ?"
    assert out.count("An empty line shows this") == 2
    assert "[red]not 4[/]␛[31m\nreward -0.5 (right 0, short -0.5)\n" in out
    assert "reward 2.5 (right 3, short -0.5)\nThe end.\nThe episode earned 2 (by hand, tries 2)" in out


def test_the_turns_of_a_row_end_the_episode(capsys, monkeypatch):
    typed(monkeypatch, "a", "b", "c")
    row = json.dumps({"text": "Say it.", "word": "red", "max_turns": 2})
    assert main(["play", NAME, "--row", row, "--prompt-column", "text"]) == 0
    out = capsys.readouterr().out
    assert "user: Say it." in out
    assert out.endswith("Out of turns.\nThe episode earned -1 (by hand, tries 2)\n")


def test_a_registered_environment_offers_its_own_examples(capsys, monkeypatch):
    typed(monkeypatch, "<answer>42</answer>")
    assert main(["play", "arithmetic"]) == 0
    assert "reward 1\nThe end." in capsys.readouterr().out


def test_the_model_of_a_run_plays_the_validation_data_of_the_run_beside_the_one_before(runs, capsys):
    assert main(["play", ENV, "--model", str(runs["lora"]), "--before", "--pace", "0", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("user: task 2 → ☃\n")
    assert [f"turn {turn}" in out for turn in (1, 2, 3)] == [True, True, False]
    assert out.count(" earned ") == 2


def test_a_run_says_in_which_environment_its_model_plays(runs, capsys):
    assert main(["play", "--model", str(runs["full"]), "--pace", "0", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("user: task 3 → ☃\n")


def test_on_a_terminal_game_after_game_is_watched_until_q(runs, capsys, monkeypatch):
    typed(monkeypatch, *[""] * 3, "q")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["play", "--model", str(runs["full"]), "--before"]) == 0
    out = capsys.readouterr().out
    told = re.findall(r"task \d|turn \d|Enter: [a-z ]+|before earned.*in all.*|before earned.*", out)
    assert [line for line in told if not line.startswith("before")] == [
        *("task 0", "turn 1", "Enter: the next move", "turn 2", "Enter: the next game"),
        *("task 1", "turn 1", "Enter: the next move", "turn 2", "Enter: the next game"),
    ]
    assert [line.endswith("(in 2 games)") for line in told if line.startswith("before")] == [False, True]


def test_a_model_plays_with_the_settings_of_its_run(runs, here, capsys):
    shutil.copytree(runs["full"] / "model", here / "model")
    (here / "run.json").write_text("{}")
    origin = json.loads((here / "model" / "skyrl.json").read_text())
    origin["settings"] |= {
        "environment.env_class": NAME,
        "environment.skyrl_gym.Guess.worth": 5,
        "environment.reward": "game_of_test_play:score",
        "data.val_data": [str(here / "rows.jsonl")],
        "generator.max_turns": 3,
    }
    (here / "model" / "skyrl.json").write_text(json.dumps(origin))
    assert main(["play", NAME, "--model", str(here / "model"), "--pace", "0", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("user: Say blue.\n")
    assert "reward 30 (in all 60)" in out, "10, 20 and 30: what the run's function pays"
    assert "turn 4" not in out
    assert main(["play", "arithmetic", "--model", str(here / "model"), "--pace", "0"]) == 0
    assert "earned 0" in capsys.readouterr().out, "another environment is paid by itself"
    (here / "rows.jsonl").unlink()
    assert main(["play", "--model", str(here / "model"), "--pace", "0"]) == 2
    assert "validation data is not here" in (said := capsys.readouterr().err)
    assert f"{NAME} cannot be made from an empty row" in said


def test_a_model_trained_on_a_mixture_plays_in_each_of_its_environments(runs, here, capsys):
    shutil.copytree(runs["full"] / "model", here / "model")
    (here / "run.json").write_text("{}")
    origin = json.loads((here / "model" / "skyrl.json").read_text())
    sum_row = {"prompt": "40 + 2?", "env_class": "arithmetic", "reward_model": {"ground_truth": "42"}}
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (sum_row, ROWS[0], sum_row)))
    origin["settings"] |= {"environment.env_class": NAME, "data.val_data": [str(here / "rows.jsonl")]}
    (here / "model" / "skyrl.json").write_text(json.dumps(origin))
    for seed, first in (("0", "user: 40 + 2?\n"), ("1", "user: Say red.\n")):
        assert main(["play", "--model", str(here / "model"), "--pace", "0", "--seed", seed]) == 0
        assert capsys.readouterr().out.startswith(first)


def test_a_model_from_elsewhere_does_not_say_which_code_runs(runs, here, capsys):
    given = here / "given"
    shutil.copytree(runs["full"] / "model", given)
    origin = json.loads((given / "skyrl.json").read_text())
    origin["settings"] |= {
        "environment.env_class": NAME,
        "environment.reward": "game_of_test_play:score",
        "data.val_data": [str(here / "rows.jsonl")],
        "generator.eval_sampling_params.max_generate_length": 3,
        "trainer.ckpt_path": str(given),
    }
    (given / "run.json").write_text("{}")  # a model's folder that says it is its own run
    (given / "skyrl.json").write_text(json.dumps(origin))
    shutil.copytree(given, given / "model")
    assert source(str(given)).settings["generator.eval_sampling_params.max_generate_length"] == 3
    assert not source(str(given)).names_environment
    assert main(["play", "--model", str(given), "--pace", "0"]) == 2
    assert "name an environment, or a run of this machine" in capsys.readouterr().err
    assert main(["play", NAME, "--data", "rows.jsonl", "--model", str(given), "--pace", "0"]) == 0
    assert "earned -4.5" in capsys.readouterr().out, "nine turns at -0.5: the environment pays, not the function"
    assert skyrl(["eval", str(given)]) == 2
    assert "add --env ENV or data=FILE" in capsys.readouterr().err


def test_a_model_that_was_exported_from_a_run_here_plays_as_in_it(runs, here, capsys):
    shutil.copytree(runs["full"] / "model", here / "exported")
    origin = json.loads((here / "exported" / "skyrl.json").read_text())
    origin["settings"]["environment.reward"] = "game_of_test_play:score"  # and not what the folder says by now
    (here / "exported" / "skyrl.json").write_text(json.dumps(origin))
    assert source(str(here / "exported")).settings.get("environment.reward") is None
    assert main(["play", "--model", str(here / "exported"), "--pace", "0", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("user: task 3 → ☃\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["play", NAME], "cannot be made from an empty row: KeyError: 'word'"),
        (["play", NAME, "--data", "none.jsonl"], "--data=none.jsonl: there is no such file"),
        (["play", NAME, "--row", "[1]"], "a row must be a JSON object"),
        (["play", NAME, "--row", "{"], "--row is no JSON"),
        (
            ["play", NAME, "--data", "rows.jsonl", "--prompt-column", "text"],
            "has no column 'text'; it has prompt, word",
        ),
        (["play", NAME, "--data", "rows.jsonl", "--max-turns", "0"], "max_turns=0 must be at least 1"),
        (["play", NAME, "--url", "http://127.0.0.1:1"], "--runtime and --url are of OpenEnv's servers"),
        (["play", "game_of_test_play:Gues"], "module game_of_test_play has no Gues; for an image write image:game_of"),
        (["play", "echo_env", "--row", "{}"], "--data, --row and --prompt-column are for a class of yours"),
        (["play", "echo_env", "--max-turns", "0"], "--max-turns=0 must be at least 1"),
        (["check", "echo_env", "--num-rows", "1"], "--num-rows is for a class of yours"),
        (["check", NAME, "-n", "1"], "say --num-rows"),
        (["check", NAME, "--runtime", "docker"], "--runtime and --url are of OpenEnv's servers"),
    ],
)
def test_what_has_no_effect_or_cannot_be_played_is_refused(words, says, capsys, monkeypatch):
    typed(monkeypatch)
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_check_gives_a_class_its_options(capsys):
    words = ["check", NAME, "--row", json.dumps(ROWS[0]), "--json", "--option"]
    assert main([*words, "worth=3"]) == 0
    assert main([*words, "worth=many"]) == 1, "'many' is no number to multiply with"
