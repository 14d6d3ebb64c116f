"""The end of a run whose terminal, disk or session goes away."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.records.__main__ import main as look
from skyrl_train.run.checkpoint import Checkpoints
from skyrl_train.run.metrics import MetricsLog
from skyrl_train.run.records.run_info import read_run_info
from skyrl_train.signals import ENDING
from tests.fakes import EvenEnv

CONTEXT = multiprocessing.get_context("forkserver")  # see conftest.py: children have everything imported


def arguments(given: Path, run: Path, *more: str) -> list[str]:
    """Two steps of two tasks each."""
    return [
        f"data.train_data=['{given}/data.jsonl']",
        "data.val_data=[]",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={run}",
        f"trainer.export_path={run}/exports",
        "trainer.ckpt_interval=1",
        "trainer.device=cpu",
        "environment.env_class=even",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "generator.n_samples_per_prompt=2",
        "generator.sampling_params.max_generate_length=4",
        *more,
    ]


def ascii_only() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def broken_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", buffering=1)


def none() -> None:
    """Return None: Python's sys.stdout after `>&-`."""


@pytest.mark.parametrize("terminal", [ascii_only, broken_pipe, full_disk, none])
@pytest.mark.parametrize("logger", ["console", "[]"])
def test_no_terminal_ends_a_run_with_an_error(given, tmp_path, monkeypatch, terminal, logger):
    stdout, stderr = terminal(), terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main(arguments(given, tmp_path, f"trainer.logger={logger}")) == 0
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert look(["show", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    if terminal is ascii_only:
        printed = stdout.buffer.getvalue().decode("ascii")
        assert "\\u2192" in printed  # the arrow between the rewards, and the task's
        assert "\\u2603" in printed
    elif stdout is not None:
        stdout.close()  # nothing is left in it that would fail now
        stderr.close()


def with_small_files(args: list[str], log: Path, max_bytes: int) -> None:
    """Main function of a child process: a run that may write no file larger than `max_bytes`."""
    register("even", EvenEnv)
    with log.open("w") as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
        sys.exit(main(args))


def test_a_checkpoint_that_finds_no_room_is_named_and_the_one_before_it_stays(given, tmp_path):
    assert main(arguments(given, tmp_path)) == 0
    before = sorted(path.name for path in tmp_path.glob("global_step_*"))
    size = (tmp_path / "global_step_2/policy/rank_0_of_1.safetensors").stat().st_size
    args = arguments(given, tmp_path, "trainer.epochs=2")
    child = CONTEXT.Process(target=with_small_files, args=(args, tmp_path / "log.txt", size // 2))
    child.start()
    child.join(400)
    log = (tmp_path / "log.txt").read_text()
    assert child.exitcode == 1, log
    assert (
        f"broken off: cannot write {tmp_path}/global_step_3.writing/policy/rank_0_of_1.safetensors: File too large"
        in log
    )
    assert "MB free there" in log
    assert "the same command goes on after step 2" in log
    assert "Traceback" not in log
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == before
    Checkpoints(tmp_path).load(2)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("trajectories/train_step_000001.jsonl.zst.writing", []),
        ("latest_ckpt_global_step.txt.writing", []),
        ("report.html.writing", []),
        ("summary.json.writing", []),
        ("profile/step_1.json.gz.writing", ["trainer.profile=true"]),
    ],
)
def test_a_full_disk_says_so_and_which_file(given, tmp_path, capfd, monkeypatch, name, more):
    def settled(folder: Path) -> None:
        """Make this file unwritable (no space left), after the start has cleared the folder."""
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/full")

    from skyrl_train.run.records import run_info

    monkeypatch.setattr(run_info, "write_run_info", lambda folder, info: settled(folder))
    assert main(arguments(given, tmp_path, *more)) == 1
    said = capfd.readouterr().err
    assert f"broken off: cannot write {tmp_path}/{name.removesuffix('.writing')}: No space left on device" in said
    assert "Traceback" not in said
    (tmp_path / name).unlink(missing_ok=True)


def test_a_full_disk_names_the_metrics(tmp_path):
    log = MetricsLog(tmp_path)
    log._file.close()
    log._file = Path("/dev/full").open("w")  # noqa: SIM115 - close() is what is tested
    with pytest.raises(OSError, match=r"No space left on device: '\S+/metrics.jsonl'"):
        log.log(1, {"a": 1.0})
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        log.close()


def test_an_export_that_finds_no_room_is_named(given, tmp_path):
    args = arguments(given, tmp_path, "trainer.hf_save_interval=1", "trainer.ckpt_interval=-1")
    size = (given / "model/model.safetensors").stat().st_size
    child = CONTEXT.Process(target=with_small_files, args=(args, tmp_path / "log.txt", size // 2))
    child.start()
    child.join(400)
    log = (tmp_path / "log.txt").read_text()
    assert child.exitcode == 1, log
    assert f"broken off: cannot write {tmp_path}/exports/global_step_1/policy: File too large" in log


def long_run(args: list[str], log: Path, is_ignored: bool) -> None:
    register("even", EvenEnv)
    with log.open("w") as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        if is_ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        sys.exit(main(args))


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_hangs_up_ends_a_run_as_sigterm_does_but_not_under_nohup(given, tmp_path, is_ignored):
    epochs = 8 if is_ignored else 10_000
    args = arguments(given, tmp_path, f"trainer.epochs={epochs}")
    child = CONTEXT.Process(target=long_run, args=(args, tmp_path / "log.txt", is_ignored))
    child.start()
    while not (tmp_path / "global_step_2").exists():
        assert child.is_alive()
        time.sleep(0.02)
    assert child.pid is not None
    with suppress(ProcessLookupError) if is_ignored else nullcontext():  # it goes on to its end, and may be there
        os.kill(child.pid, signal.SIGHUP)
    child.join(400)
    log = (tmp_path / "log.txt").read_text()
    assert child.exitcode == (0 if is_ignored else 128 + signal.SIGHUP), log
    assert is_ignored or "interrupted; the same command goes on after step" in log
    assert "Traceback" not in log


def hung_up_again(args: list[str], log: Path) -> None:
    """Run until a SIGHUP comes, and get another once the event loop has ended and before the records are written."""
    run = asyncio.run

    def run_and_hang_up(main: Any) -> Any:
        try:
            return run(main)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)

    pytest.MonkeyPatch().setattr(asyncio, "run", run_and_hang_up)
    long_run(args, log, is_ignored=False)


def test_a_second_signal_does_not_disturb_the_end_that_the_first_one_began(given, tmp_path):
    """A terminal that is closed sends SIGHUP twice."""
    args = arguments(given, tmp_path, "trainer.epochs=10000")
    child = CONTEXT.Process(target=hung_up_again, args=(args, tmp_path / "log.txt"))
    child.start()
    while not (tmp_path / "global_step_2").exists():
        assert child.is_alive()
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGHUP)
    child.join(400)
    assert child.exitcode == 128 + signal.SIGHUP, (tmp_path / "log.txt").read_text()
    assert read_run_info(tmp_path).starts[-1]["ended"] == "interrupted"


def test_what_signals_did_before_a_run_they_do_after_it(given, tmp_path):
    def mine(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in ENDING}
    try:
        assert main(arguments(given, tmp_path, "trainer.ckpt_interval=-1")) == 0
        assert [signal.getsignal(number) for number in ENDING] == [mine, mine]
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
