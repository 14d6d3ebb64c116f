"""What the tests write into a home never reaches the person's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from skyrl_train.config import TrainerConfig
from tests.home import REAL_HOME, move_in, move_out

EXPORTS = "from pathlib import Path; print(Path('~/exports').expanduser())"


def test_the_default_folders_of_a_run_lie_in_the_home_of_the_tests():
    real = Path(os.environ[REAL_HOME])
    assert Path.home() != real
    assert Path(TrainerConfig().export_path) == Path.home() / "exports"
    said = subprocess.run([sys.executable, "-c", EXPORTS], capture_output=True, text=True, check=True).stdout.strip()
    assert said == str(Path.home() / "exports")
    assert not Path(said).resolve().is_relative_to(real)
    assert (Path.home() / ".cache").resolve() == (real / ".cache").resolve(), (
        "what was fetched once is not fetched again"
    )


def test_the_home_of_the_tests_goes_and_what_its_links_lead_to_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(REAL_HOME)
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / "kept").touch()
    home = move_in()
    assert home is not None
    assert move_in() is None, "the processes of one run share it"
    (home / "exports").mkdir()
    move_out(home)
    assert not home.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".cache", ".config", "kept"]
    assert Path.home() == tmp_path
