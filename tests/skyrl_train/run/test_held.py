"""A run goes on training while a command reads it: the checkpoint that is read stays until it has been read."""

from __future__ import annotations

import subprocess
import sys

import pytest

from skyrl_train.files import remove_leftovers, whole_folder
from skyrl_train.run import saved_run
from skyrl_train.run.checkpoint import Checkpoints
from skyrl_train.run.held import HeldCheckpoint
from skyrl_train.run.run_folder import RUN_INFO, checkpoint_steps
from skyrl_train.run.saved_run import read_run
from tests.skyrl_train.run.test_checkpoint import save_learner, state


def test_a_checkpoint_that_is_read_stays_until_nobody_reads_it_any_more(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    checkpoints.save(1, state(1), save_learner)
    saved, also = read_run(tmp_path), read_run(tmp_path)
    checkpoints.save(2, state(2), save_learner)
    del also
    checkpoints.save(3, state(3), save_learner)
    assert checkpoint_steps(tmp_path) == [1, 3]
    assert (saved.learner / "index.json").is_file()
    del saved
    checkpoints.save(4, state(4), save_learner)
    assert checkpoint_steps(tmp_path) == [4]


def test_the_newest_checkpoint_is_read_although_it_was_removed_between_two_looks(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    checkpoints.save(2, state(2), save_learner)
    looks = iter([[1]])  # what the first look saw is gone by now
    monkeypatch.setattr(saved_run, "checkpoint_steps", lambda folder: next(looks, None) or checkpoint_steps(folder))
    assert read_run(tmp_path).step == 2


def test_a_checkpoint_that_took_the_place_of_the_one_that_was_opened_is_not_held_by_mistake(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state(1), save_learner)

    def replaced(descriptor: int, how: int) -> None:
        (path / "digests.txt").rename(tmp_path / "old")
        (path / "digests.txt").write_bytes((tmp_path / "old").read_bytes())

    monkeypatch.setattr("skyrl_train.run.held.fcntl.flock", replaced)
    with pytest.raises(FileNotFoundError, match="another one by now"):
        HeldCheckpoint(path)


def test_a_run_at_work_without_a_checkpoint_is_said_to_be_at_work(tmp_path):
    (tmp_path / RUN_INFO).write_text("{}")
    with pytest.raises(ValueError, match="so its model was not kept"):
        read_run(tmp_path)
    holding = "import sys; from pathlib import Path; from skyrl_train.run.run_folder import run_lock\n"
    holding += "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"no checkpoint yet: process {trainer.pid} is at work in it"):
            read_run(tmp_path)
        trainer.communicate()


WRITING = """
import sys
from pathlib import Path
from skyrl_train.files import whole_folder
with whole_folder(Path(sys.argv[1])) as unfinished:
    (unfinished / "theirs").touch()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_write_into_the_same_unfinished_folder(tmp_path):
    words = [sys.executable, "-c", WRITING, str(tmp_path / "model")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as export:
        assert export.stdout is not None
        assert export.stdout.readline() == "writing\n"
        with (
            pytest.raises(ValueError, match=r"another process is writing .*model at this moment"),
            whole_folder(tmp_path / "model"),
        ):
            pass
        assert remove_leftovers(tmp_path) == []
        export.communicate()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["theirs"]
    (tmp_path / "model.writing").mkdir()  # of a process that was killed
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "ours").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["ours"]
