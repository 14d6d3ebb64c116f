"""One trainer per folder, and only complete checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys

from skyrl_train.records.run_folder import checkpoint_steps, run_lock

CODE = """
import sys
from pathlib import Path
from skyrl_train.records.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("got it")
"""


def second(folder) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, check=False)


def test_a_second_trainer_is_refused_and_told_who_holds_the_folder(tmp_path):
    with run_lock(tmp_path):
        refused = second(tmp_path)
    assert refused.returncode == 1
    assert f"another trainer (process {os.getpid()}) is writing into {tmp_path}" in refused.stderr
    assert second(tmp_path).stdout == "got it\n"


def test_every_folder_with_a_checkpoints_name_counts_that_holds_anything(tmp_path):
    for name in ("global_step_2", "global_step_10", "global_step_3.writing", "global_step_x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digests.txt").touch()
    (tmp_path / "global_step_99").mkdir()
    assert checkpoint_steps(tmp_path) == [2, 10]
