"""Trackers start or say why not; one that fails later is reported and never ends a run."""

from __future__ import annotations

import errno
import sys
import threading

import pytest
from loguru import logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from skyrl_train.run.tracking import Tracking, backend_names


@pytest.mark.parametrize(
    "backends", ["console, tensorboard", ["console", "tensorboard"], "console,console,tensorboard,"]
)
def test_backends_as_text_or_list(backends):
    assert backend_names(backends) == ["console", "tensorboard"]


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="'wandbb' is not one of console, tensorboard, wandb, mlflow, trackio, swanlab"
    ):
        Tracking("p", "e", "console,wandbb")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "swanlab"])
def test_a_missing_package_says_how_to_install_it(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=rf"trainer.logger={name} .* `uv run --extra trackers"):
        Tracking("p", "e", name, folder=tmp_path)


def test_tensorboard_gets_every_number_once_also_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    for resumed_at, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        tracking = Tracking("p", "e", "tensorboard", folder=tmp_path, resumed_at=resumed_at)
        for step in steps:
            tracking.log({"reward": step + 10.0 * resumed_at}, step, commit=True)
        tracking.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_calls_of_one_step_are_shown_together(capsys):
    tracking = Tracking("p", "e")
    tracking.log({"reward/avg_raw_reward": 0.25}, 1)
    tracking.log({"timing/step": 2.0, "generate/num_sampled_tokens": 50}, 1)
    assert capsys.readouterr().out == ""
    tracking.log({"eval/all/avg_score": 1.0}, 2)
    assert capsys.readouterr().out == "step    1   reward  0.250   time   2.0 s\n           tokens/s 25\n"
    tracking.close()
    assert capsys.readouterr().out == "step    2   eval  1.000\n"


class OutOfReach:
    errors = (OSError,)

    def log(self, data, step):
        raise ConnectionError("no route")

    def close(self):
        raise ConnectionError("no route")


def test_a_tracker_out_of_reach_is_reported_once_and_counted(capsys):
    tracking = Tracking("p", "e")
    tracking.trackers["wandb"] = OutOfReach()
    for step in (1, 2, 3):
        tracking.log({"reward/avg_raw_reward": 1.0}, step, commit=True)
    tracking.close()
    assert tracking.failures == {"wandb": 4}
    assert capsys.readouterr().out.count("step") == 3  # the others go on


def test_a_full_disk_under_tensorboard_is_one_warning_and_no_traceback_of_its_thread(tmp_path, monkeypatch):
    from tensorboard.summary.writer import record_writer

    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING")
    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", usual := printed.append)
    tracking = Tracking("p", "n", "tensorboard", folder=tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    for step in (1, 2, 3):
        tracking.log({"reward": 1.0}, step, commit=True)
    worker = getattr(tracking.trackers["tensorboard"], "writer").file_writer.event_writer._async_writer._worker  # noqa: B009
    worker.join(60)
    tracking.close()
    logger.remove(sink)
    assert not worker.is_alive()
    assert printed == []
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert threading.excepthook == usual


def test_a_thread_of_somebody_else_still_prints_its_traceback_beside_tensorboard(tmp_path, monkeypatch):
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    tracking = Tracking("p", "n", "tensorboard", folder=tmp_path)
    broken = threading.Thread(target=lambda: 1 / 0)
    broken.start()
    broken.join()
    tracking.close()
    assert [one.exc_type for one in seen] == [ZeroDivisionError]
