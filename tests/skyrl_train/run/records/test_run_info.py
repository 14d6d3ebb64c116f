"""What run.json says of each start of a run, and that no secret reaches it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.run.records.provenance import command_line, commit_of, machine, masked_value, versions
from skyrl_train.run.records.run_info import (
    RunInfo,
    changed_settings,
    last_line,
    read_run_info,
    recorded_start,
    run_name,
    state_of,
)
from skyrl_train.run.run_folder import run_lock, usual_folders

INFO = RunInfo("folder/SmolLM2", "openenv/echo_env", name="mine")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/a/b/python", "-m", "x", "trainer.seed=1"], "python -m x trainer.seed=1"),
        (["python", "judge.api_key=abc", "+my.HF_TOKEN=abc,def"], "python 'judge.api_key=***' '+my.HF_TOKEN=***'"),
        (["python", "--api-key", "abc", "--seed", "1"], "python --api-key '***' --seed 1"),
        (["python", "--password=abc"], "python '--password=***'"),
        (["python", "judge={api_key: abc, top: 3}"], "python 'judge={api_key: ***, top: 3}'"),
        (["python", 'judge={"token": "a, b"}'], "python 'judge={\"token\": ***}'"),
        (["python", "url=http://me:abc@host/v1"], "python 'url=http://***@host/v1'"),
        (["python", "x=sk-proj-0123456789abcdef"], "python 'x=***'"),
        (["python", "generator.max_tokens=5", "tokenizer=a"], "python generator.max_tokens=5 tokenizer=a"),
        ([], ""),
    ],
)
def test_a_command_is_kept_without_its_secrets(words, shown):
    assert command_line(words) == shown


def test_settings_are_kept_without_secrets_however_deep():
    config = {
        "my.judge": {"api_key": "abc", "urls": ["https://a:abc@b/c"], "n": 3},
        "my.token": "abc",
        "trainer.seed": 1,
    }
    changed = changed_settings(config, {"trainer.seed": 42})
    assert "abc" not in json.dumps(changed)
    assert changed["trainer.seed"] == [1, 42]
    assert changed["my.judge"][0]["n"] == 3
    assert masked_value("trainer.max_tokens", 5) == 5


def test_a_commit_tells_whether_anything_was_changed(tmp_path):
    assert commit_of(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    clean = commit_of(tmp_path)
    assert len(clean) == 12
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{clean}, changed since"
    assert commit_of(tmp_path, holding=tmp_path / "not_tracked") == ""  # as a package in a virtual environment


def test_versions_and_machine_are_named():
    assert {"python", "torch", "transformers"} <= versions().keys()
    assert "cores" in machine()


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (None, "finished", None),
        (ValueError("first\nno \x1b, the password=abc"), "failed", "ValueError: no ␛, the password=***"),
        (KeyboardInterrupt(), "interrupted", None),
        (asyncio.CancelledError(), "interrupted", None),
    ],
)
def test_every_start_is_kept_with_its_end(tmp_path, monkeypatch, error, state, said):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "my_main"])

    def start(error: BaseException | None, info: RunInfo, step: int) -> None:
        with recorded_start(tmp_path, info, step):
            running = read_run_info(tmp_path)
            assert running.starts[-1]["ended"] is None
            assert state_of(tmp_path, running) == "killed"  # as nobody holds the folder
            if error is not None:
                raise error

    start(None, INFO, 0)
    if error is None:
        start(None, read_run_info(tmp_path), 7)
    else:
        with pytest.raises(type(error)):
            start(error, read_run_info(tmp_path), 7)
    info = read_run_info(tmp_path)
    first, second = info.starts
    assert (first["ended"], first["first_step"]) == ("finished", 0)
    assert (second["ended"], second["first_step"]) == (state, 7)
    assert second["error"] == said
    assert second["started"] <= second["ended_at"]
    assert second["command"] == "python -m my_main"
    assert state_of(tmp_path, info) == state
    assert info.name == "mine"


def test_a_run_without_an_end_is_running_or_was_killed(tmp_path):
    holds = (
        "import sys, time; from pathlib import Path; from skyrl_train.run.run_folder import run_lock, usual_folders\n"
    )
    holds += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    info = RunInfo(starts=[{"ended": None}])
    with subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            assert state_of(tmp_path, info) == "running"
        finally:
            process.kill()
    assert state_of(tmp_path, info) == "killed"
    with run_lock(tmp_path):  # it was only looked at
        pass
    assert state_of(tmp_path, RunInfo()) == ""


def test_the_last_line_of_an_error_is_short():
    assert last_line(RuntimeError("x" * 500)).startswith("RuntimeError: xxx")
    assert len(last_line(RuntimeError("x" * 500))) < 400
    assert last_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("environment", "model", "name"),
    [
        ("openenv/echo_env", "SmolLM2-135M-Instruct", "echo_env-SmolLM2-135M-Instruct-20"),
        ("my_game:OneWord", "/home/me/a model", "OneWord-a_model-20"),
        ("openenv/echo_env, openenv/coding_env", "m", "2_environments-m-20"),
    ],
)
def test_a_run_is_named_after_environment_model_and_date(environment, model, name):
    assert run_name(RunInfo(model, environment)).startswith(name)


def described_run(folder: Path, **changes: Any) -> Path:
    """Write the records of a run of two steps."""
    folder.mkdir(parents=True)
    info = {"model": "SmolLM2", "environment": "openenv/echo_env", "total_steps": 2, "name": folder.name}
    start = {"started": "2026-11-27T16:59:00+00:00", "ended": "finished", "versions": {"torch": "2.13.0"}}
    changed = {"trainer.seed": [changes.pop("seed", 1), 42]}
    (folder / "run.json").write_text(json.dumps({**info, "starts": [{**start, **changes}], "changed": changed}))
    lines = [{"step": 0, "eval/all/avg_score": 0.25}, {"step": 2, "eval/all/avg_score": 0.75, "timing/step": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def listed(capsys, monkeypatch):
    from skyrl_train.runs import main

    def ask(*words: object, columns: int = 80, code: int = 0) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return ask


@pytest.mark.parametrize("columns", [80, 100])
def test_runs_are_listed_newest_first_within_the_width(listed, tmp_path, columns):
    long_name = "a" * 90
    described_run(tmp_path / "one", environment="x")
    failed = {"started": "2026-11-28T10:00:00+00:00", "ended": "failed", "error": "ValueError: \x1b[31m no"}
    described_run(tmp_path / "deep" / "er" / long_name, **failed)
    described_run(tmp_path / "one" / "previous" / "1")  # moved aside: not a run of its own
    lines = listed(tmp_path, columns=columns).splitlines()
    paths = [line for line in lines if str(tmp_path) in line]
    assert [Path(line.strip()).name for line in paths] == [long_name, "one"]  # whole, to be copied
    assert all(len(line) <= columns for line in lines if line not in paths)
    assert lines[1].split()[:5] == ["2026-11-28", "10:00", "failed", "2/2", "0.250"]
    assert "  ValueError: ␛[31m no" in lines
    assert ("SmolLM2" in lines[1]) is (columns == 100)


def test_a_folder_is_named_without_the_way_to_it(listed, tmp_path, monkeypatch):
    described_run(tmp_path / "one")
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    assert listed("..", columns=200).splitlines()[-1].strip() == str(tmp_path / "one")


@pytest.mark.parametrize(("environment", "model"), [("e" * 90, "m"), ("e", "m" * 90), ("e" * 90, "m" * 90)])
def test_a_long_name_takes_no_room_from_the_other_columns(listed, tmp_path, environment, model):
    file = described_run(tmp_path / "one") / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "environment": environment, "model": model}))
    for columns in (60, 80, 110):
        heading, line, *_ = listed(tmp_path, columns=columns).splitlines()
        assert len(line) <= columns
        assert line.startswith("2026-11-27 16:59  finished  2/2    0.250 > 0.750  e")
        assert heading.split()[:4] == ["started", "ended", "steps", "reward"]
        assert ("model" in heading) is (columns > 100)


@pytest.mark.parametrize("columns", ["0", "1", "40"])
def test_no_terminal_is_too_narrow_for_the_numbers(listed, tmp_path, columns):
    a, b = described_run(tmp_path / "a"), described_run(tmp_path / "b", seed=2)
    assert "2026-11-27 16:59  finished  2/2    0.250 > 0.750" in listed(tmp_path, columns=columns)
    [evaluation] = [line for line in listed("compare", a, b, columns=columns).splitlines() if "evaluation" in line]
    assert evaluation.split() == ["evaluation", *["0.25", "0.75", "0.75"] * 2]


def test_a_field_of_a_later_version_is_no_damage(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "SmolLM2", "weather": "fair"}')
    assert read_run_info(tmp_path).model == "SmolLM2"
    (tmp_path / "run.json").write_text('["SmolLM2"]')
    with pytest.raises(ValueError, match="is damaged"):
        read_run_info(tmp_path)


def test_runs_are_listed_as_json(listed, tmp_path):
    described_run(tmp_path / "one")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    runs = {Path(run["folder"]).name: run for run in json.loads(listed(tmp_path, "--json"))}
    assert (runs["one"]["state"], runs["one"]["reward_after"], runs["one"]["steps"]) == ("finished", 0.75, 2)
    assert runs["bad"]["state"] == "damaged"


def test_two_runs_are_compared(listed, tmp_path):
    a = described_run(tmp_path / "a")
    b = described_run(tmp_path / "b", seed=2, versions={"torch": "2.14.0"})
    found = json.loads(listed("compare", a, b, "--json"))
    assert found["settings"] == {"trainer.seed": [1, 2]}
    assert found["differences"] == {"torch": ["2.13.0", "2.14.0"]}
    assert found["metrics"]["evaluation"]["a"] == {"first": 0.25, "last": 0.75, "median": 0.5, "best": 0.75}
    shown = listed("compare", a, b)
    assert max(map(len, shown.splitlines()[3:])) <= 80
    assert "trainer.seed" in shown
    assert "versions and machine that differ" in shown
    assert "model, code, versions and machine: the same\n\nsettings: the same" in listed("compare", a, a)


def test_runs_are_looked_for_where_scripts_and_pages_write_them(listed, tmp_path, monkeypatch):
    runs, here = tmp_path / "project" / "runs", tmp_path / "elsewhere"
    described_run(runs / "mine")
    here.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(runs.parent)
    assert usual_folders() == ["runs"]
    assert str(runs / "mine") in listed()
    monkeypatch.chdir(here)
    assert usual_folders() == ["."]
    assert "no runs below" in listed()
    (tmp_path / "home" / "ckpts").mkdir(parents=True)
    monkeypatch.chdir(runs.parent)
    assert usual_folders() == ["~/ckpts", "runs"]


def test_what_is_no_run_is_refused(listed, tmp_path):
    assert "there is no folder" in listed(tmp_path / "gone", code=2)
    assert "is no run's folder" in listed("compare", tmp_path, tmp_path, code=2)
    (tmp_path / "\x1b[31mred").mkdir()
    shown = listed(tmp_path / "\x1b[31mred")
    assert "no runs below" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"starts": 5}'),
        ("run.json", '{"starts": [5]}'),
        ("run.json", '{"model": null}'),
        ("run.json", '{"changed": {"a": 1}}'),
        ("run.json", '{"total_steps": "many"}'),
        ("metrics.jsonl", '{"step": 1e999}\n'),
        ("metrics.jsonl", '{"step": 1, "generate/num_sampled_tokens": "many"}\n'),
        ("metrics.jsonl", '{"step": 1, "reward/avg_raw_reward": "high"}\n'),
    ],
)
def test_a_foreign_file_of_the_same_name_hides_no_other_run(listed, tmp_path, name, content):
    described_run(tmp_path / "one")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / name).write_text(content)
    shown = listed(tmp_path)
    assert str(tmp_path / "one") in shown
    assert str(tmp_path / "foreign") in shown
