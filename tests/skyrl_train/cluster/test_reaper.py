"""The reaper: once a driver is gone, nothing of its run is left, and nothing of another's is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from skyrl_train.cluster import reaper

# Maps two files of shared memory, as workers of vLLM do, says so, and waits to be killed.
WORKER = """
import mmap, sys
for path in sys.argv[1:]:
    with open(path, "r+b") as file:
        globals()[path] = mmap.mmap(file.fileno(), 16)
print("mapped", flush=True)
sys.stdin.read()
"""


def worker(mark: str, *paths: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, paths)],
        env={**os.environ, reaper.VARIABLE: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    return process


def test_processes_of_the_run_are_killed_and_their_shared_memory_goes_unless_another_maps_it():
    mark, other = uuid.uuid4().hex, uuid.uuid4().hex
    ours, shared = (Path(f"/dev/shm/skyrl-test-{mark}-{name}") for name in ("ours", "shared"))
    for path in (ours, shared):
        path.write_bytes(bytes(16))
    of_run, of_another = worker(mark, ours, shared), worker(other, shared)
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", reaper.__file__, mark, "1"]
        )  # a driver that is not its parent
        assert process.wait(timeout=60) == 0
        assert of_run.wait(timeout=60) == -9
        assert of_another.poll() is None
        assert not ours.exists()
        assert shared.exists()
    finally:
        for left in (of_run, of_another):
            left.kill()
            left.communicate()
        for path in (ours, shared):
            path.unlink(missing_ok=True)


def test_the_shared_memory_of_a_process_that_was_killed_in_mid_run_goes_at_the_end():
    """Also that of a semaphore, which gets its name once it is mapped."""
    for seconds in (3, 6, 12, 60):  # for the reaper, on a busy machine
        mark = uuid.uuid4().hex
        watching = subprocess.Popen([sys.executable, "-I", reaper.__file__, mark, str(os.getpid())])
        time.sleep(seconds / 3)
        path, first_name = Path(f"/dev/shm/skyrl-test-{mark}"), Path(f"/dev/shm/skyrl-test-{mark}.first")
        first_name.write_bytes(bytes(16))
        killed = worker(mark, first_name)
        path.hardlink_to(first_name)
        first_name.unlink()
        time.sleep(seconds)
        killed.kill()
        killed.communicate()
        watching.terminate()
        assert watching.wait(timeout=60) == 0
        if not path.exists():
            return
        path.unlink()
    raise AssertionError("it was never noticed")


def test_ray_that_does_not_start_is_refused_in_one_line():
    pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
    code = """
from skyrl_train.cluster.session import RaySession
try:
    RaySession()
except ValueError as error:
    print(error)
"""
    where = {**os.environ, "RAY_TMPDIR": "/proc/nowhere", "RAY_ADDRESS": ""}  # no folder can be made there
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Ray did not start here (")
    assert done.stdout.endswith("or type the same command again\n")
    assert done.stdout.count("\n") == 1
