"""The command `skyrl`: its table, its exit statuses, and help that does nothing else."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from skyrl_train.commands.main import COMMANDS, Command, main, offered

ROOT = Path(__file__).parents[3]
PROGRAMS = [
    "skyrl_train.entrypoints.main_base",
    "skyrl_train.entrypoints.main_generate",
    "skyrl_train.config",
    "skyrl_train.records",
    "integrations.openenv",
    "integrations.openenv.entrypoints.main_openenv",
    "integrations.openenv.prepare_dummy_dataset",
    "integrations.openenv.install_environment",
]


@pytest.mark.parametrize("name", offered())
def test_the_help_of_every_subcommand_names_it_and_does_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: skyrl {name} ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", PROGRAMS)
def test_the_help_of_every_program_does_nothing(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    spec = find_spec(module)
    assert spec is not None
    program = f"{module}.__main__" if spec.submodule_search_locations else module
    monkeypatch.delitem(sys.modules, program, raising=False)  # runpy warns of a module that it runs a second time
    monkeypatch.setattr(sys, "argv", [module, *(["trainer.epochs=0"] if ".main_" in module else []), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_skyrl_lists_the_subcommands_without_importing_what_they_need():
    script = "import sys; from skyrl_train.commands.main import main; main(['--help']); print(sorted(sys.modules))"
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    began = os.times().children_user
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    seconds = os.times().children_user - began
    text, _, modules = done.stdout.partition("[")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == offered()
    assert not {"torch", "transformers", "omegaconf", "hydra", "rich", "numpy"} & set(
        modules.replace("'", "").split(", ")
    )
    assert seconds < 1  # of a processor; it takes 0.05


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage: skyrl COMMAND"),
        (["trian"], "did you mean `skyrl train`?"),
        (["xyz\x1b[31m"], "there are train, "),
        (["train"], "nothing to train on: add --env ENV"),
        (["train", "--gpus", "1"], "complete --env"),
        (["check", "no_such_env"], "unknown env_name='no_such_env'"),
    ],
)
def test_what_is_refused_has_one_line_and_status_2(words, says, capsys):
    assert main(words) == 2
    refused = capsys.readouterr().err
    assert says in refused
    assert "\x1b" not in refused


def test_a_command_whose_module_is_not_installed_is_not_offered(monkeypatch):
    monkeypatch.setitem(COMMANDS, "runs", Command("skyrl_train.no_such_module", "nothing"))
    assert "runs" not in offered()
    assert main(["runs"]) == 2


def test_config_prints_keys_for_programs_as_json(capsys):
    assert main(["config", "--search", "seed", "--json"]) == 0
    keys = {entry["key"]: entry["default"] for entry in json.loads(capsys.readouterr().out)}
    assert keys["trainer.seed"] == "42"
    assert main(["config", "--search", "nosuchword"]) == 1
