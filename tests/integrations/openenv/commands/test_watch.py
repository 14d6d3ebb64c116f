"""`play ENV --model`: the moves of a model as the environment answered them, of one player or two side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from integrations.openenv.__main__ import main
from integrations.openenv.catalog import catalog_entry
from integrations.openenv.commands.watch import Move, WatchedGame, board
from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from skyrl_train.commands.trained import Talker
from tests.tiny_models import save_tiny_model

ESCAPE = "\x1b[31m"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("given") / "model", max_position_embeddings=2048)


def test_a_model_plays_a_game_to_its_end_and_its_moves_are_shown(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = ["play", "echo_env", "--model", str(model), "--seed", "3", "--runtime", "local", "--pace", "0"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("user: The environment echoes")
    assert "turn 1" in out
    assert "There is no action in your reply." in out  # a random model writes none
    assert "turn 2" not in out  # an episode of echo_env has one turn
    assert "earned 0" in out
    assert all(letter.isprintable() or letter == "\n" for letter in out)


def test_a_model_plays_the_tasks_that_its_run_was_evaluated_on(model, tmp_path, capsys):
    rows, _ = dataset_rows("echo_env", 3, 0, seed=77)
    write_parquet([{**row, "env_name": "echo-env"} for row in rows], tmp_path / "rows.parquet")
    settings = {
        "environment.env_class": "openenv",
        "environment.openenv.invalid_action_penalty": 0.25,
        "data.val_data": [str(tmp_path / "rows.parquet")],
        "trainer.device": "cpu",
    }
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "model" / "skyrl.json").write_text(json.dumps({"step": 3, "settings": settings}))
    watch = ["play", "--model", str(tmp_path / "model"), "--runtime", "local", "--pace", "0"]
    task = rows[1]["prompt"][-1]["content"].splitlines()[-1]
    for words in (["--seed", "1"], ["--seed", "1", "echo_env"]):
        assert main([*watch, *words]) == 0
        out = capsys.readouterr().out
        assert f"{task}\nturn 1" in out
        assert "reward -0.25" in out


@pytest.mark.parametrize("words", [[], ["--model", "MODEL"]])
def test_an_environment_whose_engine_is_missing_is_refused_before_a_model_is_loaded(model, words, capsys, monkeypatch):
    monkeypatch.setattr(type(catalog_entry("openspiel_env")), "engine_module", "no_such_module")
    monkeypatch.setattr(Talker, "start", lambda _: pytest.fail("a model was loaded"))
    words = [str(model) if word == "MODEL" else word for word in words]
    assert main(["play", "openspiel_env", "--runtime", "local", *words]) == 2
    assert "no_such_module is not installed; pip install 'skyrl-train[openspiel-env]'" in capsys.readouterr().err


def test_two_players_stand_side_by_side_and_what_they_say_cannot_steer_the_terminal():
    none: Any = None
    players = [WatchedGame(name, none, none, total=total) for name, total in (("run before", 0.0), ("run step 9", 1.0))]
    moves = [Move(f"left{ESCAPE} [red]", "..o..\n..x..", -0.5), None]
    console = Console(width=60, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(board(4, players, moves))
    shown = console.export_text()
    assert [name in shown.splitlines()[2] for name in ("run before", "run step 9")] == [True, True]
    assert "left␛[31m [red]" in shown
    assert "│ ..o..  " in shown
    assert "reward -0.5" in shown
    assert "the episode is over" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--before"], "--before and --pace need --model"),
        (["--model", "./nowhere"], "there is no such folder"),
        (["--model", "MODEL", "--before"], "is no run, so there is nothing before it"),
        (["--model", "MODEL", "--pace", "-1"], "must be a number of seconds"),
    ],
)
def test_what_cannot_be_watched_is_refused(model, words, says, capsys):
    assert main(["play", "echo_env", *(str(model) if word == "MODEL" else word for word in words)]) == 2
    assert says in capsys.readouterr().err
