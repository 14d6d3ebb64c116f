"""Every attack works without a wall, and none behind one."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from integrations.openenv.servers.coding_env import make_app
from skyrl_gym.walls import wall as walls
from skyrl_gym.walls.nursery import Interpreter, Nursery
from tests.integrations.openenv.servers.places import (
    WAIT_S,
    DockerContainer,
    Process,
    Scene,
    Workers,
    base_image,
    scene,
    succeeds,
)
from tests.skyrl_gym.walls import attacks

WORKER = "tests.integrations.openenv.servers.attack_worker"
READABLE = (Path(__file__).parent, Path(attacks.__file__).parent)
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
    "talk to another session",
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


# A container alone, without the workers that a server confines in it: it holds one program and nobody to talk to.
@pytest.mark.parametrize("name", [name for name in attacks.ALL if name != "talk to another session"])
def test_in_docker_it_is_stopped(name: str, here: Scene, image: str) -> None:
    assert not succeeds(name, DockerContainer(image), here)


def test_an_honest_program_is_heard_in_every_place(
    here: Scene, behind_bubblewrap: Interpreter, walled: Nursery, confined: Nursery
) -> None:
    for place in (Process(behind_bubblewrap, NO_LIMIT), Workers(walled), Workers(confined)):
        assert "done" in place.run(attacks.HONEST, here, WAIT_S)
        assert place.victim_lives(here)
        place.close()


def test_an_honest_program_is_heard_in_docker(here: Scene, image: str) -> None:
    place = DockerContainer(image)
    assert "done" in place.run(attacks.HONEST, here, WAIT_S)
    place.close()


def test_a_worker_has_its_session_open_and_nothing_else(here: Scene, walled: Nursery) -> None:
    opened = "loot = str([d for d in range(64) if libc.lseek(d, 0, 1) >= 0 or ctypes.get_errno() == 29])"  # ESPIPE
    place = Workers(walled)
    assert len(ast.literal_eval(place.run(opened, here, WAIT_S))) == 4  # /dev/null three times, and a socket
    place.close()


def fake_bubblewrap(folder: Path, text: str) -> None:
    command = folder / "bwrap"
    command.write_text(f"#!/bin/sh\n{text}\n")
    command.chmod(0o755)


def test_without_bubblewrap_the_wall_is_confinement_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert walls.describe() == "confinement (no bubblewrap: the command bwrap is not installed)"
    fake_bubblewrap(tmp_path, "echo No permissions to create new namespace >&2; exit 1")
    wall = walls.strongest_wall()
    assert wall.name == "confinement"
    assert wall.reason == "bubblewrap does not work here: No permissions to create new namespace"


def test_without_a_filter_the_server_refuses_unless_the_risk_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls, "can_filter", lambda: False)
    monkeypatch.delenv("OPENENV_ACCEPT_UNSAFE", raising=False)
    assert walls.describe().startswith("none (no system call filter here")
    with pytest.raises(SystemExit, match=r"environment\.openenv\.accept_unsafe=true"):
        make_app(1)
    monkeypatch.setenv("OPENENV_ACCEPT_UNSAFE", "1")
    assert walls.accepted_wall().name == "none"


def test_our_image_declares_that_the_container_is_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENENV_WALL", "container")
    assert walls.strongest_wall().name == "container"
    monkeypatch.setenv("OPENENV_WALL", "paper")
    with pytest.raises(ValueError, match="OPENENV_WALL=paper"):
        walls.strongest_wall()


def test_the_server_says_which_wall_it_is(coding_url: str) -> None:
    metadata = requests.get(f"{coding_url}/metadata", timeout=WAIT_S).json()
    assert str(walls.strongest_wall()) in metadata["description"]
