"""The command `skyrl`: its table, its exit statuses, and help that does nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import skyrl_train
from skyrl_train.commands.main import COMMANDS, Command, main, offered
from skyrl_train.console import print_json, shell_line
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[3]
PROGRAMS = [
    "skyrl_train.entrypoints.main_base",
    "skyrl_train.entrypoints.main_generate",
    "skyrl_train.config",
    "skyrl_train.records",
    "skyrl_train.runs",
    "skyrl_train.view",
    "integrations.openenv",
    "integrations.openenv.entrypoints.main_openenv",
    "integrations.openenv.prepare_dummy_dataset",
    "integrations.openenv.install_environment",
    "examples.arithmetic_cpu.train",
    "examples.nim.train",
    "examples.openai_agent.train",
]


@pytest.mark.parametrize("name", [*offered(), "runs compare"])
def test_the_help_of_every_subcommand_names_it_and_does_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: skyrl {name} ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["runs", "--help"], ["config"]])
def test_a_reader_that_leaves_early_and_a_full_disk_end_no_command_with_a_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -0` does
    with open("/dev/full", "w") as full:
        for output in (writing, full.fileno()):
            done = subprocess.run(
                [sys.executable, "-m", "skyrl_train", *words], stdout=output, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
    os.close(writing)


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"skyrl-train {skyrl_train.__version__}\n"


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


HELP_OF_ALL = """
import contextlib, io, sys
from skyrl_train.commands.main import main, offered
for name in offered():
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([name, "--help"])
print({"torch", "transformers", "pandas"} & set(sys.modules))
"""


def test_the_help_of_no_subcommand_waits_for_torch():
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage: skyrl COMMAND"),
        (["trian"], "did you mean `skyrl train`?"),
        (["xyz\x1b[31m"], "there are train, "),
        (["train"], "nothing to train on: add --env ENV"),
        (["train", "--gpus", "1"], "complete --env"),
        (["check", "no_such_env"], "unknown env_name='no_such_env'"),
        (["play", "echo"], "unknown env_name='echo'; did you mean echo_env? (known: "),
        (["check", "my_game:OneWord"], "'my_game:OneWord': there is no module my_game here"),
        (["train", "echo_env"], "'echo_env' is no KEY=VALUE; an environment is named as --env echo_env"),
        (["train", "./my env"], "'./my env' is no KEY=VALUE; an environment is named as --env './my env'"),
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


def test_config_knows_the_keys_of_openenvs_environments_too(capsys):
    assert main(["config", "--search", "openenv", "max", "session", "--json"]) == 0
    found = {entry["key"]: entry["default"] for entry in json.loads(capsys.readouterr().out)}
    assert found["environment.openenv.max_sessions"] == "256"


@pytest.mark.parametrize(
    "words", [["eval", "./nowhere"], ["export", "./nowhere"], ["runs", "./nowhere"], ["check", "no_such_env"],
              ["export"], ["config", "--no-such-option"]],
)  # fmt: skip
def test_what_is_refused_is_json_too(words, capsys):
    with contextlib.suppress(SystemExit):
        assert main([*words, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out).keys() == {"error"}
    assert printed.err


def test_what_the_system_refuses_is_said_without_its_number(monkeypatch, capsys):
    def refused(words: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "closed/config.json")

    monkeypatch.setattr("skyrl_train.commands.chat.main", refused)
    assert main(["chat", "closed"]) == 2
    assert capsys.readouterr().err == "skyrl chat: closed/config.json: Permission denied\n"


def test_printed_json_is_what_every_reader_takes(capsys):
    print_json({"a": [float("nan"), float("inf"), 1.5], "b": Path("x")})
    printed = capsys.readouterr().out
    assert json.loads(printed, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": "x"}


@pytest.mark.parametrize("columns", [60, 200])
def test_the_settings_are_printed_within_the_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["config"]) == 0
    meanings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert columns == 200 or max(map(len, meanings)) <= columns
    assert max(map(len, meanings)) <= 116


PLACES = {
    "a file": "a file",
    "an empty folder": "empty",
    "no user's home": "~no_such_user_here/run",
    "a line break": "two\nlines",
    "an escape": "\x1b[31mred",
    "bytes that are no UTF-8": os.fsdecode(b"\xff\xfe"),
    "a name too long for a file": "n" * 5000,
}


@pytest.mark.parametrize("kind", PLACES)
def test_whatever_a_place_is_called_no_command_prints_a_traceback(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("no run")
    (tmp_path / "empty").mkdir()
    place = PLACES[kind]
    of_a_run = [
        ["chat", place],
        ["serve", place],
        ["export", place],
        ["eval", place],
        ["runs", "compare", place, place],
    ]
    of_a_folder = [["runs", place], ["view", "--no-open", place]] if kind != "an empty folder" else []
    for words in of_a_run + of_a_folder:
        assert main(words) == 2, words
        refused = capsys.readouterr().err
        assert refused.strip()
        assert "Traceback" not in refused
        assert "\x1b" not in refused


@pytest.mark.parametrize(
    ("data", "model", "says"),
    [
        ("a.jsonl", "~no_such_user_here/model", "model '~no_such_user_here/model': there is no such folder"),
        ("~no_such_user_here/a.jsonl", "MODEL", "there is no file ~no_such_user_here/a.jsonl"),
    ],
)
def test_a_data_set_or_a_model_below_no_users_home_is_refused(data, model, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    if model == "MODEL":
        save_tiny_model(tmp_path / model)
    keys = [f"data.train_data=['{data}']", "data.val_data=[]", f"trainer.policy.model.path='{model}'"]
    places = [f"trainer.ckpt_path={tmp_path}/run", f"trainer.export_path={tmp_path}/exports"]
    assert main(["train", *keys, *places, "environment.env_class=gsm8k", "trainer.device=cpu"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_line_to_paste_is_what_it_was_and_readable():
    words = ["data.train_data=['a b.jsonl']", "x='$HOME `id` \\ !'", 'say="it\'s"', "two words", "plain=1", "a;b"]
    line = shell_line(words)
    assert line.startswith("\"data.train_data=['a b.jsonl']\" ")
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split("\0")[:-1] == words
