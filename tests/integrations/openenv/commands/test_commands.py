"""The command line as people use it: real servers, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from integrations.openenv.__main__ import main
from integrations.openenv.catalog import CATALOG
from tests.integrations.openenv.troubled import NAME

ROOT = Path(__file__).resolve().parents[4]
COMMAND = [sys.executable, "-m", "integrations.openenv"]


def run(*words: str, lines: str = "", code: int = 0) -> str:
    """Run a command; return its stdout, or its stderr if the expected exit code is 2."""
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*COMMAND, *words], input=lines, capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code != 2 else done.stderr


def test_list_shows_every_environment_with_its_options() -> None:
    shown = run("list")
    for name in CATALOG:
        assert name in shown
    assert "game='catch'" in shown
    assert "package.module:app" in shown


def test_doctor_has_a_line_for_everything_a_run_needs() -> None:
    shown = run("doctor")
    for what in ("CPU", "memory", "GPU", "bfloat16", "model", "free disk", "Docker", "wall", *CATALOG):
        assert what in shown


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed but what everybody has, and pip has installed that."""
    monkeypatch.setattr("integrations.openenv.catalog.entry.find_spec", lambda name: None)
    monkeypatch.setattr("skyrl_train.console.IN_CHECKOUT", False)


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["list", "doctor"])
@pytest.mark.usefixtures("no_engines")
def test_reports_fit_the_width_and_break_no_command(command, columns, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > columns] == []
    installing = [line.strip(" `") for line in lines if "pip install" in line]
    assert installing == [f"pip install 'skyrl-train[{entry.extra}]'" for entry in CATALOG.values() if entry.extra]


def test_doctor_reports_as_json(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    assert lines.keys() >= {"CPU", "torch", *CATALOG}
    assert lines["echo_env"] == {"what": "echo_env", "state": "engine installed", "well": True, "advice": ""}


def test_an_unknown_argument_is_answered_with_the_usage_of_its_command(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--jsn"], prog="skyrl")
    assert capsys.readouterr().err.startswith("usage: skyrl doctor ")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command that is refused says, without a process of its own."""
    assert main(words) == 2
    return capsys.readouterr().err


def test_an_unknown_environment_is_an_error_that_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown env_name='nope' (known: echo_env, coding_env" in run("play", "nope", code=2)
    for command in ("check", "serve"):
        assert "unknown env_name='nope' (known: echo_env, coding_env" in refused(capsys, command, "nope")
    assert "echo_env has no option 'volume'" in refused(capsys, "play", "echo_env", "--option", "volume=1")


def test_only_doctor_waits_for_torch() -> None:
    code = "import sys, integrations.openenv.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_play_reads_actions_from_a_pipe(echo_url: str) -> None:
    shown = run("play", "echo_env", "--url", echo_url, "--max-turns", "3", lines="\nred lamp\n<action>x</action>\nq\n")
    assert "Now these words." in shown
    assert shown.count("An empty line shows this") == 2
    assert "The environment said: red lamp\n" in shown
    assert "The environment said: x\n" in shown
    assert "\x1b" not in shown  # no colours in a pipe
    assert "The episode earned" in shown


def test_play_ends_with_the_episode(echo_url: str) -> None:
    task = run("play", "echo_env", "--url", echo_url, "--seed", "4")
    words = task.split("Now these words.\n\n")[1].split("\n")[0]
    shown = run("play", "echo_env", "--url", echo_url, "--seed", "4", lines=f"{words}\nmore\n")
    assert "reward 1\nThe end.\nThe episode earned 1 " in shown


def test_a_server_by_its_address_is_played_with_what_it_says_of_itself(echo_url: str) -> None:
    shown = run("play", echo_url, lines='{"tool": "echo_message", "arguments": {"message": "hi"}}\n')
    assert "- echo_message(message: a text): Echo the message back." in shown
    assert "\nhi\n" in shown


def test_who_plays_by_hand_with_calls_of_tools_is_told_which_tools_there_are(echo_url: str) -> None:
    call = '{"name": "echo_message", "arguments": {"message": "hi"}}'
    shown = run("play", echo_url, "--option", "tool_calls=true", lines=f"{call}\n<tool_call>{call}</tool_call>\nq\n")
    assert '"name": "echo_message", "description": "Echo the message back."' in shown
    assert "assistant: <tool_call>{" in shown  # the example
    assert "Write a call of a tool, with or without <tool_call></tool_call>." in shown
    assert shown.count("\nhi\n") == 2


def test_check_passes_for_the_smallest_environment() -> None:
    report = json.loads(run("check", "echo_env", "-n", "4", "--json", "--runtime", "local"))
    assert report["passed"] is True
    assert report["findings"] == []
    assert report["gold"]["mean"] == 1.0
    assert report["random"]["mean"] < 0.6
    assert (report["repeats"], report["tasks_differ"], report["num_sessions"]) == (True, True, 16)
    assert report["left_processes"] in ([], None)


def test_check_says_why_training_would_fail(echo_url: str) -> None:
    """The echo server pays nothing, so by its own reward nothing can be learned."""
    shown = run("check", echo_url, "-n", "2", code=1)
    assert "fail  the reward never varies: every episode earned 0 and none reached its end: allow more with" in shown
    assert "warn  the first observation is empty and all prompts are equal" in shown
    assert "1 to fix." in shown
    assert "nothing could be played" in run("check", "http://127.0.0.1:9", "-n", "2", code=1)


@pytest.mark.parametrize(("trouble", "seeds_differ"), [("none", True), ("one task", False)])
def test_check_sees_by_whole_episodes_whether_seeds_differ(trouble: str, seeds_differ: bool) -> None:
    """A server that asks the same question each time and keeps the answer to itself."""
    options = ("--option", f'variables={{"TROUBLE": "{trouble}"}}', "--max-turns", "8")
    report = json.loads(run("check", NAME, "--json", "-n", "8", *options))
    assert report["tasks_differ"] is seeds_differ
    assert any("no two seeds were seen to differ" in found["words"] for found in report["findings"]) is not seeds_differ


def test_check_shows_the_words_of_a_server_that_always_fails() -> None:
    report = run("check", NAME, "-n", "2", "--option", 'variables={"TROUBLE": "bug"}', code=1)
    assert "EXECUTION_ERROR: 'dict' object has no attribute 'model_dump'" in report
    report = run("check", NAME, "-n", "2", "--option", 'variables={"TROUBLE": "always"}', code=1)
    assert "most often: The environment does not accept this action: no data set was loaded" in report


def test_check_shows_a_reward_that_cannot_be_learned_from(template_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(template_folder, tmp_path / "my_env")
    server = folder / "server" / "my_env_environment.py"
    server.write_text(server.read_text().replace("reward = length * 0.1", "reward = float('nan')"))
    shown = run("check", str(folder), "-n", "2", code=1)
    assert "episodes failed: " in shown
    assert "reward must be a finite float, not nan" in shown


def test_serve_runs_our_server_until_it_is_told_to_stop(template_folder: Path) -> None:
    for name in ("echo_env", str(template_folder)):
        server = subprocess.Popen(
            [*COMMAND, "serve", name, "--max-sessions", "2"], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert server.stdout is not None
        with server.stdout as announced:
            url = json.loads(announced.readline())["url"]
            with urllib.request.urlopen(f"{url}/schema", timeout=60) as answer:
                assert "action" in json.load(answer)
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) is not None


@pytest.mark.parametrize("name", ["http://127.0.0.1:8000", "image:my_env"])
def test_serve_has_no_server_for_what_others_serve(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no server of ours for it" in refused(capsys, "serve", name)


@pytest.mark.parametrize("name", ["tests.fakes:Completion", "statistics:mean", "statistics:Nothing"])
def test_what_can_be_imported_and_is_no_environment_is_no_image(name, capsys) -> None:
    assert f"{name}" in (words := refused(capsys, "check", name))
    assert f"image:{name}" in words
