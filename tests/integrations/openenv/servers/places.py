"""The places where attacks run: without a wall, in bubblewrap, in a confined worker, in both, in Docker."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from integrations.openenv.hosting.containers import Limits
from skyrl_gym.tools.python_process import run_python
from skyrl_gym.walls.nursery import MAX_ANSWER_BYTES, Interpreter, Nursery, Worker
from tests.integrations.openenv.processes import gone
from tests.skyrl_gym.walls import attacks

WAIT_S = 60.0  # the machine may be busy
SILENT = ("endless loop", "1 GB of output", "memory bomb")  # some walls kill these before they write anything
BASE_IMAGES = ("python-standin:3.11-slim", "python:3.11-slim")
VICTIM = """
import ctypes, os, sys
held = os.environ["WANDB_API_KEY"].encode() + b"/" * 64
print(os.getpid(), ctypes.cast(ctypes.c_char_p(held), ctypes.c_void_p).value, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """The targets of an attack on this machine. Each of them holds the secret."""

    secret: str
    secret_file: Path
    outside_file: Path
    port: int
    socket_name: str
    marker: str
    victim: subprocess.Popen[bytes]
    victim_address: int

    def given(self, pid: int, address: int, descriptors: Sequence[int]) -> dict[str, Any]:
        return {
            "secret_file": str(self.secret_file),
            "outside_file": str(self.outside_file),
            "own_folder": str(self.secret_file.parent),
            "port": self.port,
            "socket_name": self.socket_name,
            "marker": self.marker,
            "mark": self.secret[:8],
            "host_pid": self.victim.pid,
            "host_parent": os.getpid(),
            "pid": pid,
            "address": address,
            "descriptors": list(descriptors),
        }

    def survivors(self) -> list[psutil.Process]:
        """Return the processes of the attack that still run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                comm = Path(f"/proc/{process.pid}/comm")
                with contextlib.suppress(OSError):
                    if comm.read_text().strip() == self.marker and process.status() != "zombie":
                        found.append(process)
        return found


@contextlib.contextmanager
def scene() -> Generator[Scene]:
    """Set the targets up; at the end remove them and kill processes that an attack left running."""
    secret, marker = uuid.uuid4().hex, uuid.uuid4().hex[:12]
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as tcp:
        os.chmod(folder, 0o777)  # accessible to every user, unless a wall prevents it
        secret_file = Path(folder, "secret")
        secret_file.write_text(secret)
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind("\0" + marker)
        abstract.listen()
        for listening in (tcp, abstract):
            threading.Thread(target=_tell, args=(listening, secret), daemon=True).start()
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"WANDB_API_KEY": secret},
        )
        assert victim.stdout is not None
        address = int(victim.stdout.readline().split()[1])
        here = Scene(
            secret, secret_file, Path(folder, "outside"), tcp.getsockname()[1], marker, marker, victim, address
        )
        try:
            yield here
        finally:
            victim.kill()
            victim.communicate()
            abstract.shutdown(socket.SHUT_RDWR)
            abstract.close()
            tcp.shutdown(socket.SHUT_RDWR)
            for process in here.survivors():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _tell(listening: socket.socket, secret: str) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(secret.encode())


class Place(Protocol):
    """A place to run one attack."""

    def run(self, code: str, here: Scene, wait_s: float) -> str:
        """Run the attack; return its loot or its error, "" if nothing came back in time."""
        ...

    def victim_lives(self, here: Scene) -> bool: ...

    def close(self) -> None:
        """End the attack's process as the owner of the place would."""
        ...


class Workers:
    """A worker of a nursery, with a second worker to attack."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._open: list[Worker] = []

    def run(self, code: str, here: Scene, wait_s: float) -> str:
        attacker, self._sibling = self._nursery.worker(""), self._nursery.worker(here.secret)
        self._open += [attacker, self._sibling]
        sibling = self._sibling.ask({}, WAIT_S)
        given = here.given(sibling["pid"], sibling["address"], range(3, 64))
        return attacker.ask({"code": attacks.BEGIN + code, "given": given}, wait_s) or ""

    def victim_lives(self, here: Scene) -> bool:
        return self._sibling.ask({}, WAIT_S) is not None and _outlives(here.victim)

    def close(self) -> None:
        for worker in self._open:
            worker.close()


class Process:
    """A process in its own session, whose group is killed at the end."""

    def __init__(self, interpreter: Interpreter, max_bytes: int) -> None:
        self._interpreter = interpreter
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, code: str, here: Scene, wait_s: float) -> str:
        self._process = subprocess.Popen(
            [*self._interpreter.command, "-c", _script(code, here)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(self._interpreter.environment),
            start_new_session=True,
        )
        return last_line(self._process, self._max_bytes, wait_s)

    def victim_lives(self, here: Scene) -> bool:
        return _outlives(here.victim)

    def close(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _wait_for(self._process)


class Programs:
    """The sandbox of skyrl_gym's lcb, searchcode and python tool (run_python)."""

    def run(self, code: str, here: Scene, wait_s: float) -> str:
        lines = run_python(_script(code, here), timeout_s=wait_s, max_output=200_000).stdout.splitlines()
        return lines[-2] if lines[-1:] == ["end"] else ""

    def victim_lives(self, here: Scene) -> bool:
        return _outlives(here.victim)

    def close(self) -> None:
        """Do nothing: the program has ended when `run` returns."""


class DockerContainer:
    """A container with the pool's limits but less memory, removed when its time is up."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._name = f"attack-{uuid.uuid4().hex[:12]}"

    def run(self, code: str, here: Scene, wait_s: float) -> str:
        wall = (*Limits(memory_gb=0.25).flags(), "--network=none", "--user=65534:65534")
        script = (self._image, "python3", "-c", _script(code, here))
        options = (f"--name={self._name}", "--pull=never", "--log-driver=none", *wall, "--pids-limit=64")
        subprocess.run(["docker", "create", *options, *script], check=True, capture_output=True, timeout=WAIT_S)
        self._client = subprocess.Popen(
            ["docker", "start", "--attach", self._name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        loot = last_line(self._client, MAX_ANSWER_BYTES, wait_s)
        if not loot:
            self._remove()  # what the pool does when an answer is too late or too long
        return loot

    def victim_lives(self, here: Scene) -> bool:
        return _outlives(here.victim)

    def close(self) -> None:
        self._remove()

    def _remove(self) -> None:
        self._client.kill()  # first: Docker does not remove a container whose output nobody takes
        _wait_for(self._client)
        subprocess.run(["docker", "rm", "--force", "--volumes", self._name], capture_output=True, timeout=WAIT_S)


def succeeds(name: str, place: Place, here: Scene) -> bool:
    """Run an attack and return whether it got the secret or did its damage."""
    try:
        if name in SILENT:
            loot = place.run(attacks.ALL[name], here, 4.0 if name == "endless loop" else WAIT_S)
        else:
            loot = place.run(attacks.ALL[name], here, WAIT_S)
            assert loot, "neither its loot nor its error came back"
        match name:
            case _ if name in attacks.READS:
                return here.secret in loot
            case _ if name in attacks.DEEDS:
                return "done" in loot
            case _ if name.startswith("write outside"):
                return here.outside_file.exists()
            case _ if name.startswith("kill another process"):
                return not place.victim_lives(here)
            case "endless loop":
                return _lives_on(here)
    finally:
        place.close()
    assert name.startswith("orphan")
    return _lives_on(here)


def _lives_on(here: Scene) -> bool:
    return not gone([process.pid for process in here.survivors()], within_s=8)


def _outlives(victim: subprocess.Popen[bytes]) -> bool:
    """Return whether a process is there although a signal may have been sent to it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        victim.wait(0.5)
    return victim.returncode is None


def base_image() -> str | None:
    """Return an image with a Python that Docker has; None without Docker or such an image."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        for image in BASE_IMAGES:
            if subprocess.run(["docker", "image", "inspect", image], capture_output=True, timeout=10).returncode == 0:
                return image
    return None


def last_line(process: subprocess.Popen[bytes], max_bytes: int, wait_s: float) -> str:
    """Return the line before "end" in a process's output; "" if it comes too late or after max_bytes."""
    assert process.stdout is not None
    end, received, tail = time.monotonic() + wait_s, 0, b""
    while select.select([process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
        some = os.read(process.stdout.fileno(), 1 << 20)
        received += len(some)
        tail = (tail + some)[-200_000:]
        if received > max_bytes or not some:
            break
        if tail.endswith(b"\nend\n"):
            return tail.decode(errors="replace").splitlines()[-2]
    return ""


def _wait_for(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process without reading its output, whose other end an orphan may hold."""
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def _script(code: str, here: Scene) -> str:
    given = here.given(here.victim.pid, here.victim_address, [1])
    return f"""
names = {{"given": {given!r}}}
try:
    exec({attacks.BEGIN + code!r}, names)
    loot = names["loot"]
except (OSError, MemoryError, RuntimeError) as error:
    loot = type(error).__name__ + ": " + str(error)
print(repr(loot) + "\\nend", flush=True)
"""
