"""A whole run on two learner ranks and two engines, through the real main: trained, resumed on one, killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from skyrl_train.run.metrics import read_metrics
from tests.skyrl_train.cluster.runs import NUM_STEPS, ROOT, TWO, arguments, environment, write_given

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_given(tmp_path_factory.mktemp("given"))


def start(given: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.skyrl_train.cluster.runs", *arguments(given, given / "run"), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def killed(given: Path) -> Iterator[list[psutil.Process]]:
    """The processes of a long run of which rank 1 was killed after the second step, and which has ended by that."""
    process = start(given, *TWO, "trainer.epochs=1000")
    try:
        family = family_after_step(2, given / "run", process)
        [victim] = [child for child in family if title(child) == "ray::LearnerRank"][1:]
        victim.send_signal(signal.SIGKILL)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
        (given / "output.txt").write_text(f"{time.monotonic() - began}\n{process.returncode}\n{output}")
        yield family
    finally:
        process.kill()


def family_after_step(step: int, run_folder: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the run's processes, once it has made this step."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(run_folder / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"step {step} was not reached:\n{process.communicate()[0][-3000:]}")


def title(process: psutil.Process) -> str:
    """Return "ray::LearnerRank", also while it runs a method and is called after it."""
    try:
        return process.cmdline()[0].partition(".")[0] if process.cmdline() else ""
    except psutil.NoSuchProcess:
        return ""


def shared_memory_of_runs() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob("*") if "skyrl" in path.name or "plasma" in path.name]


def test_a_dead_rank_ends_the_run_with_its_name_and_how_to_go_on_and_nothing_is_left(given, killed):
    seconds, status, output = (given / "output.txt").read_text().split("\n", 2)
    assert float(seconds) < 25  # of which Ray's own end takes some
    assert int(status) == 1
    assert "stopped: learner rank " in output
    assert " of 2 (process " in output
    assert "the same command goes on after step" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(killed, timeout=10)
    assert alive == []
    assert shared_memory_of_runs() == []


def test_a_killed_driver_leaves_no_process_and_the_same_command_goes_on_with_two_ranks(given, killed):
    before = read_metrics(given / "run" / "metrics.jsonl")[-1]["step"]
    process = start(given, *TWO, "trainer.epochs=1000")
    family = family_after_step(before + 1, given / "run", process)
    names = [title(child) for child in family]
    assert (names.count("ray::LearnerRank"), names.count("ray::EngineActor")) == (2, 2)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert shared_memory_of_runs() == []
    steps = [line["step"] for line in read_metrics(given / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_what_two_ranks_have_written_one_process_goes_on_with(given, killed):
    """It reads rows of two ranks, says what changes, and finishes: NUM_STEPS more than there are."""
    lines = read_metrics(given / "run" / "metrics.jsonl")
    epochs = -(-lines[-1]["step"] // NUM_STEPS) + 1
    process = start(given, f"trainer.epochs={epochs}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    assert "resuming after step" in output
    assert "order" in output
    after = read_metrics(given / "run" / "metrics.jsonl")
    assert after[-1]["step"] == epochs * NUM_STEPS
    assert [line["step"] for line in after] == list(range(1, len(after) + 1))
    assert all(line["policy/grad_norm"] > 0 for line in after if "policy/grad_norm" in line)
    with_two = [line for line in after if "weights/push_seconds" in line]
    assert 0 < len(with_two) < len(after)
    assert all(line["weights/max_logprob_difference"] < 1e-4 for line in with_two)
