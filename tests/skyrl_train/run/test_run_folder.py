"""One trainer per folder; what is damaged in it is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from loguru import logger

from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.run_info import read_run_info
from skyrl_train.run.run_folder import checkpoint_steps, run_lock, truncate_metrics

CODE = """
import sys
from pathlib import Path
from skyrl_train.run.run_folder import run_lock
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


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00\n", b'{"step": \n', b"[1]\n", b'{"stop": 2}\n', b'{"step": null}\n'])
def test_a_damaged_line_of_the_metrics_is_named_and_a_resumed_run_goes_on_without_it(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + damage + b'{"step": 3}\n{"step": 4, "re')
    with pytest.raises(ValueError, match=r"line 3 of \S+metrics.jsonl is damaged"):
        read_metrics(path)
    lines = []
    sink = logger.add(lambda message: lines.append(str(message)), level="WARNING")
    truncate_metrics(path, 3)
    logger.remove(sink)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 3]
    assert "line 3 of" in lines[0]
    assert len(lines) == 1


def test_a_damaged_run_json_is_named(tmp_path):
    for damage in (b"", b"\xff", b"[]", b'{"model": 1}'):
        (tmp_path / "run.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            read_run_info(tmp_path)
