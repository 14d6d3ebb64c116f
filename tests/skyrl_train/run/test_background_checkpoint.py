"""A checkpoint is brought to the disk while the next step runs, and counts only once all of it is there."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.callbacks import CallbackInput, TrainingCallback, TrainingControl
from skyrl_train.entrypoints.experiment import BasePPOExp
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run import checkpoint
from skyrl_train.run.checkpoint import Checkpoints
from skyrl_train.run.run_folder import checkpoint_steps
from tests.skyrl_train.test_ends import arguments

LONG_S = 200.0  # that a disk takes which nobody makes faster


class SlowDisk:
    """Digests no checkpoint of step 1 before `is_over`, and tells whether it had to wait for it in vain."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_over, self.came_in_time = threading.Event(), True
        self.write_digests = checkpoint.write_digests
        monkeypatch.setattr(checkpoint, "write_digests", self)

    def __call__(self, folder: Path, header: str) -> None:
        if folder.name == "global_step_1.writing":
            self.came_in_time = self.is_over.wait(LONG_S)
        self.write_digests(folder, header)


class AfterStep(TrainingCallback):
    """Calls a function at the end of step 2."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_step_end(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None:
        if callback_input.global_step == 2:
            self.call()


def experiment(callback: TrainingCallback) -> type[BasePPOExp]:
    class Experiment(BasePPOExp):
        def get_callbacks(self) -> list[TrainingCallback]:
            return [callback]

    return Experiment


def test_the_next_step_runs_while_a_checkpoint_is_written_which_is_none_before_it_is_whole(
    given, tmp_path, monkeypatch
):
    disk, seen = SlowDisk(monkeypatch), []

    def look() -> None:
        seen.extend([checkpoint_steps(tmp_path), sorted(path.name for path in tmp_path.glob("global_step_*"))])
        disk.is_over.set()

    assert main(arguments(given, tmp_path), experiment(AfterStep(look))) == 0
    assert disk.came_in_time
    assert seen == [[], ["global_step_1.writing"]]
    assert checkpoint_steps(tmp_path) == [1, 2]  # the run has waited for the last one
    for step in (1, 2):
        Checkpoints(tmp_path).load(step)


@pytest.mark.parametrize("error", [RuntimeError("the user's own"), KeyboardInterrupt()])
def test_a_run_that_breaks_off_still_finishes_its_checkpoint(given, tmp_path, monkeypatch, error):
    disk = SlowDisk(monkeypatch)

    def break_off() -> None:
        threading.Timer(0.3, disk.is_over.set).start()
        raise error

    broken_off = experiment(AfterStep(break_off))
    if isinstance(error, KeyboardInterrupt):
        assert main(arguments(given, tmp_path), broken_off) == 130
    else:
        with pytest.raises(RuntimeError, match="the user's own"):
            main(arguments(given, tmp_path), broken_off)
    assert checkpoint_steps(tmp_path) == [1]
    assert Checkpoints(tmp_path).load(1)[0] == 1


def test_an_error_that_comes_after_the_last_step_ends_the_run_and_names_the_file(given, tmp_path, monkeypatch, capfd):
    write_digests = checkpoint.write_digests

    def fail_at_last(folder: Path, header: str) -> None:
        if folder.name == "global_step_2.writing":
            raise OSError(28, "No space left on device", str(folder / "digests.txt"))
        write_digests(folder, header)

    monkeypatch.setattr(checkpoint, "write_digests", fail_at_last)
    assert main(arguments(given, tmp_path)) == 1
    said = capfd.readouterr().err
    assert f"broken off: cannot write {tmp_path}/global_step_2.writing/digests.txt: No space left on device" in said
    assert "the same command goes on after step 1" in said
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_1"]


class OnSave(TrainingCallback):
    """Notes whether the checkpoint is whole when on_save comes, and which step is then the newest."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, list[int]]] = []

    def on_save(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None:
        assert callback_input.ckpt_path is not None
        path = Path(callback_input.ckpt_path)
        Checkpoints(path.parent).load(path)
        self.saved.append((callback_input.global_step, checkpoint_steps(path.parent)))


def test_a_callback_that_listens_to_on_save_gets_a_whole_checkpoint_before_the_next_step(given, tmp_path):
    callback = OnSave()
    assert main(arguments(given, tmp_path), experiment(callback)) == 0
    assert callback.saved == [(1, [1]), (2, [1, 2])]
