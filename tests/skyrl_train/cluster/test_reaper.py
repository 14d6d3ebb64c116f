"""The reaper: once a driver is gone, nothing of its run is left, and nothing of another's is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

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
