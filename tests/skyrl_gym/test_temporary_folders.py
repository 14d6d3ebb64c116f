"""No temporary folder of ours outlives its process for longer than until the next start."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from skyrl_gym import temporary_folders
from skyrl_gym.temporary_folders import PREFIXES, PROGRAM, reap_temporary_folders, temporary_folder

COMPILER = """#!/bin/sh
touch "$SEEN"
exec sleep 600
"""
COMPILE = """
from pathlib import Path
from skyrl_train.ops.cpu.c_library import compiled_library
compiled_library(Path("a.c"), [])
"""
HOLD = """
import sys
from skyrl_gym.temporary_folders import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A temporary folder of its own, for this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def hold(prefix: str = PROGRAM) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, prefix], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_there_while_its_block_lasts(places):
    with temporary_folder(PROGRAM) as folder:
        assert folder.parent == places
        (folder / "closed").mkdir(mode=0o000)
        (places / "mine").mkdir(mode=0o500)
        (folder / "link").symlink_to(places / "mine")
        assert reap_temporary_folders() == []
    assert [path.name for path in places.iterdir()] == ["mine"]
    assert (places / "mine").stat().st_mode & 0o777 == 0o500  # what a link names is left alone


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_folder_of_a_killed_process_is_reaped_and_that_of_a_living_one_is_not(places, prefix):
    dead, dead_folder = hold(prefix)
    living, living_folder = hold(prefix)
    dead.kill()
    dead.wait()
    assert dead_folder.is_dir()
    assert reap_temporary_folders() == [dead_folder]
    assert living_folder.is_dir()
    living.communicate("")
    assert list(places.iterdir()) == []


def test_the_first_folder_of_a_process_reaps(places):
    dead, dead_folder = hold()
    dead.kill()
    dead.wait()
    living, _ = hold()
    assert not dead_folder.exists()
    living.communicate("")


def test_kill_9_while_a_compiler_runs_leaves_nothing_after_the_next_start(places, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "cc").write_text(COMPILER)
    (elsewhere / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(elsewhere / "cc"))
    monkeypatch.setenv("SEEN", str(elsewhere / "seen"))
    process = subprocess.Popen([sys.executable, "-c", COMPILE], start_new_session=True)
    while not (elsewhere / "seen").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the compiler
    assert [path.name.startswith("skyrl-c-") for path in places.iterdir()] == [True]
    temporary_folders._reap_once.cache_clear()  # as in a process that starts now
    with temporary_folder(PROGRAM):
        pass
    assert list(places.iterdir()) == []


def test_what_is_not_ours_stays(places):
    (places / "skyrl_gym_file").write_text("a file")
    (places / "elsewhere").mkdir()
    (places / "skyrl-c-link").symlink_to(places / "elsewhere")
    assert reap_temporary_folders() == []
    assert sorted(path.name for path in places.iterdir()) == ["elsewhere", "skyrl-c-link", "skyrl_gym_file"]


def make_and_reap(folder: str, rounds: int) -> None:
    tempfile.tempdir = folder
    for _ in range(rounds):
        with temporary_folder(PREFIXES[0]) as own:
            (own / "a").write_text("")
            reap_temporary_folders()
            assert (own / "a").exists()


def test_processes_that_make_and_reap_at_once_never_take_each_others_folders(places):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=make_and_reap, args=(str(places), 100)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert os.listdir(places) == []


def test_every_temporary_folder_of_the_trainer_is_one_that_is_reaped():
    """Only the folder of a conversion is elsewhere: beside its result, where packaged.py removes what was left."""
    root = Path(temporary_folders.__file__).parents[1]
    files = [file for package in ("skyrl_gym", "skyrl_train") for file in (root / package).rglob("*.py")]
    makers = {file.name for file in files if re.search(r"\b(mkdtemp|TemporaryDirectory)\(", file.read_text())}
    assert makers == {"temporary_folders.py", "packaged.py"}
    assert (root / "skyrl_train/policy/packaged.py").read_text().count("TemporaryDirectory(") == 1
