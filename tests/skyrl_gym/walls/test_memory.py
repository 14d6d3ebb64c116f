"""Programs together are bounded, and the kernel ends them before the trainer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from skyrl_gym.walls import memory
from skyrl_gym.walls.nursery import Interpreter, Nursery, Worker
from skyrl_gym.walls.wall import strongest_wall
from tests.skyrl_gym.walls import counting_worker

WORKER = "tests.skyrl_gym.walls.counting_worker"
MB = 1 << 20
LIMIT = 400 * MB


def interpreter(kind: str) -> Interpreter | None:
    if kind == "plain":
        return None
    wall = strongest_wall((Path(counting_worker.__file__).parent,))
    if wall.name != "bubblewrap":
        pytest.skip(str(wall))
    return wall.interpreter


@pytest.fixture(params=["cgroup", "watch"])
def bounded_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "watch":
        monkeypatch.setattr(memory.Cgroup, "make", lambda _: None)
    else:
        group = memory.Cgroup.make(LIMIT)
        if group is None:
            pytest.skip("no cgroup is to be had here")
        group.close()
    return request.param


@pytest.fixture(params=["plain", "bubblewrap"])
def nursery(request: pytest.FixtureRequest, bounded_by: str) -> Iterator[Nursery]:
    nursery = Nursery(WORKER, interpreter(request.param), LIMIT)
    yield nursery
    nursery.close()


def held_together(nursery: Nursery) -> int:
    return sum(map(memory.private_bytes, memory.descendants(nursery._process.pid)))


def is_bounded(nursery: Nursery, within_s: float) -> bool:
    """Return whether all hold no more than they may, and the nursery's own, at the latest after so many seconds."""
    end = time.monotonic() + within_s
    while held_together(nursery) >= LIMIT + 60 * MB:
        if time.monotonic() > end:
            return False
        time.sleep(memory.WATCH_S)
    return True


@pytest.mark.parametrize("how", ["hold_mb", "hold_shared_mb"])
def test_ten_sessions_hold_no_more_than_all_may(nursery: Nursery, bounded_by: str, how: str) -> None:
    small = nursery.worker(0)
    assert small.ask("count", 30) is not None
    workers: list[Worker] = []
    for _ in range(10):
        workers.append(nursery.worker(0))
        workers[-1].ask({how: 90}, 60)
        assert is_bounded(nursery, within_s=60.0 if bounded_by == "watch" else 0.0)
    alive = [worker for worker in workers if worker.ask("count", 30) is not None]
    assert 1 <= len(alive) <= 4
    assert small.ask("count", 30) is not None  # the largest go, not whoever is there
    for worker in [small, *workers]:
        worker.close()


def test_a_group_is_removed_and_what_a_kill_left_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    group = memory.Cgroup.make(LIMIT)
    if group is None:
        pytest.skip("no cgroup is to be had here")
    forgotten = group.folder.with_name(f"{memory.PREFIX}-{2**22 - 1}-x")
    forgotten.mkdir()
    group.close()
    assert not group.folder.exists()
    again = memory.Cgroup.make(LIMIT)
    assert again is not None
    again.close()
    assert not forgotten.exists()


def test_no_cgroup_is_made_where_that_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_own_cgroups", lambda: iter([(tmp_path / "none", 1), (tmp_path, 2)]))
    assert memory.Cgroup.make(LIMIT) is None
    (tmp_path / "cgroup.subtree_control").write_text("cpu pids\n")
    assert memory.Cgroup.make(LIMIT) is None


@pytest.mark.parametrize("kind", ["plain", "bubblewrap"])
def test_the_kernel_ends_workers_before_their_owner(kind: str) -> None:
    nursery = Nursery(WORKER, interpreter(kind))
    worker = nursery.worker(0)
    worker.ask("count", 30)
    of_nursery = [nursery._process.pid, *memory.descendants(nursery._process.pid)]
    assert len(of_nursery) >= 2
    assert set(of_nursery) <= set(memory.descendants(os.getpid()))
    assert {Path(f"/proc/{process}/oom_score_adj").read_text().strip() for process in of_nursery} == {"1000"}
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000
    assert psutil.pid_exists(of_nursery[0])
    nursery.close()


def test_all_programs_get_a_part_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert memory.LEAST_BYTES <= memory.memory_of_programs() <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text(str(16 << 30))
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 30, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(memory, "_own_cgroups", lambda: iter([(tmp_path, 2)]))
    assert memory.memory_of_programs() == 2 << 30
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_of_programs() == 512 << 30
