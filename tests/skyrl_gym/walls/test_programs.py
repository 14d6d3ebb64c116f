"""Every attack that works without a wall, let loose as a program that lcb, searchcode or the python tool runs."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

import skyrl_gym
from skyrl_gym.tools import PythonCodeExecutorToolGroup, python_process
from skyrl_gym.walls.wall import can_filter, strongest_wall
from tests.integrations.openenv.servers.places import WAIT_S, Programs, Scene, scene, succeeds
from tests.skyrl_gym.walls import attacks

# It looks in the trainer's memory for what stands behind a mark: the answer that the test expects.
READ_THE_ANSWER = """
trainer, mark = {trainer}, bytes.fromhex({mark!r})
with open(f"/proc/{{trainer}}/maps") as maps, open(f"/proc/{{trainer}}/mem", "rb", buffering=0) as memory:
    for line in maps:
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if " rw-p " in line and end - start < 1 << 28 and "stack" not in line:
            memory.seek(start)
            for rest in memory.read(end - start).split(mark)[1:]:
                if rest[32:33] == b"!":
                    print(mark.decode() + rest[:33].decode())
                    raise SystemExit
"""


@pytest.fixture
def here() -> Iterator[Scene]:
    with scene() as it:
        yield it


@pytest.fixture(scope="module")
def behind_bubblewrap() -> Programs:
    if strongest_wall().name != "bubblewrap":
        pytest.skip(str(strongest_wall()))
    return Programs()


@pytest.fixture(scope="module")
def behind_confinement(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    if not can_filter():
        pytest.skip("no system call filter here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
        patch.setattr(python_process, "_PROGRAMS", python_process._Programs())
        yield Programs()


@pytest.mark.parametrize("name", attacks.ALL)
def test_behind_bubblewrap_a_program_is_stopped(name: str, here: Scene, behind_bubblewrap: Programs) -> None:
    assert not succeeds(name, behind_bubblewrap, here)


@pytest.mark.parametrize("name", attacks.ALL)
def test_without_bubblewrap_a_program_is_stopped(name: str, here: Scene, behind_confinement: Programs) -> None:
    assert not succeeds(name, behind_confinement, here)


def test_an_honest_program_is_heard(here: Scene, behind_bubblewrap: Programs, behind_confinement: Programs) -> None:
    for place in (behind_bubblewrap, behind_confinement):
        assert "done" in place.run(attacks.HONEST, here, WAIT_S)


def test_the_expected_answer_is_read_without_a_wall_only() -> None:
    mark, secret = uuid.uuid4().hex[:12], uuid.uuid4().hex
    code = READ_THE_ANSWER.format(trainer=os.getpid(), mark=mark.encode().hex())
    tests = [{"input": "", "output": f"{mark}{secret}!"}]
    env = skyrl_gym.make("lcb", env_config={}, extras={"reward_spec": {"ground_truth": tests}})
    assert env.step(f"```python\n{code}\n```")["reward"] == 0.0
    assert "Error" in PythonCodeExecutorToolGroup().python(code)
    if os.geteuid() == 0:  # some machines let only root read the memory of another process
        plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
        assert plain.stdout.strip() == f"{mark}{secret}!"
