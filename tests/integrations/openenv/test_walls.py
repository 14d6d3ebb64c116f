"""Every attack works without a wall, and none behind one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.openenv.servers import walls
from integrations.openenv.servers.nursery import Interpreter, Nursery
from tests.integrations.openenv import attacks
from tests.integrations.openenv.places import DockerContainer, Place, Process, Scene, Workers, base_image, scene
from tests.integrations.openenv.processes import gone

WORKER = "tests.integrations.openenv.attack_worker"
READABLE = (walls.SERVERS, Path(__file__).parent)
NO_LIMIT = 2**40
ROOTS_ONLY = ("kernel setting", "trace another process", "rights in a new namespace", "memory")
# Files, network and processes are bubblewrap's to hide. These are not, and the confinement of each worker stops them.
NOT_FOR_BUBBLEWRAP_ALONE = (
    "fork bomb",
    "memory bomb",
    "memory bomb of many processes",
    "endless loop",
    "1 GB of output",
    "rights in a new namespace",
)


@pytest.fixture
def here() -> Iterator[Scene]:
    with scene() as it:
        yield it


@pytest.fixture(scope="module")
def behind_bubblewrap() -> Interpreter:
    wall = walls.strongest_wall(READABLE)
    if wall.name != "bubblewrap":
        pytest.skip(str(wall))
    return wall.interpreter


@pytest.fixture(scope="module")
def walled(behind_bubblewrap: Interpreter) -> Iterator[Nursery]:
    nursery = Nursery(WORKER, behind_bubblewrap)
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def confined() -> Iterator[Nursery]:
    if not walls.can_filter():
        pytest.skip("no system call filter here")
    nursery = Nursery(WORKER)
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def image() -> str:
    found = base_image()
    if found is None:
        pytest.skip("no Docker answers, or it has no image with Python")
    return found


def succeeds(name: str, place: Place, here: Scene) -> bool:
    """Let it loose, and look at what it got or did."""
    try:
        loot = place.run(name, here)
        if name in attacks.READS:
            return here.secret in loot
        if name in attacks.DEEDS:
            return "done" in loot
        if name == "write outside":
            return here.outside_file.exists()
        if name == "kill another process":
            return not place.victim_lives(here)
        if name == "endless loop":
            return not gone([process.pid for process in here.survivors()], within_s=5)
    finally:
        place.close()
    assert name == "orphan"
    return not gone([process.pid for process in here.survivors()], within_s=5)


@pytest.mark.parametrize("name", attacks.ALL)
def test_without_a_wall_it_works(name: str, here: Scene) -> None:
    if os.geteuid() != 0 and name.startswith(ROOTS_ONLY):
        pytest.skip("some machines let only root do this, wall or no wall")
    plain = Interpreter((sys.executable,), dict(os.environ))
    assert succeeds(name, Process(plain, NO_LIMIT), here)


@pytest.mark.parametrize("name", attacks.ALL)
def test_behind_bubblewrap_a_worker_is_stopped(name: str, here: Scene, walled: Nursery) -> None:
    assert not succeeds(name, Workers(walled), here)


@pytest.mark.parametrize("name", attacks.ALL)
def test_a_confined_worker_without_bubblewrap_is_stopped(name: str, here: Scene, confined: Nursery) -> None:
    assert not succeeds(name, Workers(confined), here)


@pytest.mark.parametrize("name", [name for name in attacks.ALL if name not in NOT_FOR_BUBBLEWRAP_ALONE])
def test_bubblewrap_without_confinement_stops_it(name: str, here: Scene, behind_bubblewrap: Interpreter) -> None:
    assert not succeeds(name, Process(behind_bubblewrap, NO_LIMIT), here)


@pytest.mark.parametrize("name", attacks.ALL)
def test_in_docker_it_is_stopped(name: str, here: Scene, image: str) -> None:
    assert not succeeds(name, DockerContainer(image), here)
