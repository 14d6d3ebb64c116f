"""What a user names as package.module:name is found, in the current folder too, or the reason is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import skyrl_gym
from skyrl_gym.error import Error
from skyrl_gym.importing import import_named
from tests.fakes import EvenEnv

ROOT = Path(__file__).parents[2]
ENV = """
from skyrl_gym.envs.base_text_env import BaseTextEnv


class First(BaseTextEnv):
    def __init__(self, env_config, extras):
        super().__init__()
        self.letter = extras["word"][0]

    def step(self, action):
        return {"observations": [], "reward": float(action == self.letter), "done": True, "metadata": {}}

    def gold_actions(self):
        return [self.letter]
"""


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module_here:Env", "there is no module no_such_module_here"),
        ("tests.fakes:NoSuchEnv", "module tests.fakes has no NoSuchEnv"),
        ("./games/mine.py:Game", r"must be a name like 'package.module:Class'; write games.mine:Game"),
        ("tests.fakes", "must be a name like"),
        ("os:path.join; rm", "must be a name like"),
    ],
)
def test_what_cannot_be_found_is_said(path, words):
    with pytest.raises(Error, match=words):
        import_named(path)


def test_a_package_that_the_users_module_misses_is_not_taken_for_the_module(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\nEnv = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        import_named("needs_more:Env")


def test_an_import_path_is_the_id_of_an_environment():
    env = skyrl_gym.make("tests.fakes:EvenEnv", env_config={}, extras={})
    assert env.spec is not None
    assert (type(env).__name__, env.spec.id) == ("EvenEnv", "tests.fakes:EvenEnv")


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a console script would: the current folder is not where Python looks for modules."""
    code = "import sys; sys.path[0:1] = [sys.argv.pop(1)]; from skyrl_gym.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(ROOT), "check", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_check_plays_a_class_of_the_current_folder(tmp_path):
    (tmp_path / "own_game.py").write_text(ENV)
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "First letter of cat?", "word": "cat"}\n')
    good = check(tmp_path, "own_game:First", "--data", "tasks.jsonl")
    assert good.returncode == 0, good.stderr
    assert "own_game:First: keeps the contract" in good.stdout
    assert "ok   the gold actions earn max_reward" in good.stdout
    assert "rewards 0 to 1" in good.stdout

    without_row = check(tmp_path, "own_game:First")
    assert without_row.returncode == 1
    assert "KeyError" in without_row.stdout
    assert "--data FILE" in without_row.stdout.splitlines()[-1]

    unknown = check(tmp_path, "own_game:Last")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "check: 'own_game:Last': module own_game has no Last\n"


class NoExamples(EvenEnv):
    @classmethod
    def example_extras(cls):
        raise RuntimeError("none")


class WrongExamples(EvenEnv):
    @classmethod
    def example_extras(cls):
        return [3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["arithmetic", "--row", "{"], "--row is no JSON"),
        (["arithmetic", "--row", "[1]"], "must be a JSON object"),
        (["arithmetic", "--data", "gone.jsonl"], "No such file"),
        (["arithmetic", "--num-rows", "0"], "--num-rows=0 must be at least 1"),
        (["arithmetic", "--row", '{"max_turns": "3"}'], 'max_turns must be a whole number, not "3"'),
        ([f"{__name__}:NoExamples"], 'NoExamples raised RuntimeError: "none"'),
        ([f"{__name__}:WrongExamples"], "must be a JSON object of columns, not"),
    ],
)
def test_rows_that_are_none_are_refused(arguments, words, capsys):
    from skyrl_gym.commands import main

    assert main(["check", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert main(["check", *arguments, "--json"]) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]


def test_what_the_environment_prints_is_not_in_the_json(tmp_path):
    noise = "import os\n\n\nclass Loud(First):\n    def step(self, action):\n        print(1)\n"
    noise += "        os.system('echo 2')\n        return super().step(action)\n"
    (tmp_path / "own_game.py").write_text(ENV + "\n\n" + noise)
    done = check(tmp_path, "own_game:Loud", "--row", '{"word": "cat"}', "--json")
    assert json.loads(done.stdout)["passed"], done.stderr
    assert {"1", "2"} <= set(done.stderr.split())


def test_a_reward_that_never_varies_is_warned_of(capsys):
    from skyrl_gym.commands import main

    assert main(["check", "single_turn"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("warn every episode earned the same")
