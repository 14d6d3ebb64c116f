"""`check` says which call of an environment would have ended the process without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GAME = """
import os
from skyrl_gym.envs.base_text_env import BaseTextEnv

class Game(BaseTextEnv):
    def __init__(self, env_config, extras):
        super().__init__()

    def step(self, action):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        {ends}
        return {{"observations": [], "reward": 1.0, "done": True, "metadata": {{}}}}
"""


def check(ends: str, folder: Path, package: str) -> subprocess.CompletedProcess[str]:
    (folder / "game.py").write_text(ends if "import" in ends else GAME.format(ends=ends))
    return subprocess.run(
        [sys.executable, "-m", package, "check", "game:Game"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("package", ["skyrl_gym", "skyrl_train"])
def test_an_exit_is_a_broken_rule(package: str, tmp_path: Path) -> None:
    done = check("os._exit(3)", tmp_path, package)
    assert done.returncode == 1, done.stderr
    assert 'step("") raised RuntimeError: "os._exit(3) would end this process' in done.stdout


@pytest.mark.parametrize("package", ["skyrl_gym", "skyrl_train"])
def test_an_exit_of_the_import_is_refused(package: str, tmp_path: Path) -> None:
    done = check("import os; os._exit(9)", tmp_path, package)
    assert (done.returncode, done.stdout) == (2, "")
    assert "os._exit(9) would end this process" in done.stderr


def test_a_crash_shows_the_line_of_the_environment(tmp_path: Path) -> None:
    done = check("os.abort()", tmp_path, "skyrl_gym")
    assert done.returncode < 0
    assert 'game.py", line 13 in step' in done.stderr


def test_a_child_of_the_environment_may_end(tmp_path: Path) -> None:
    assert check("pass", tmp_path, "skyrl_gym").returncode == 0
