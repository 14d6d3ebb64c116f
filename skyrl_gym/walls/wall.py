"""Choice of the wall around programs that a model writes: the strongest sandbox that this machine allows.

bubblewrap   the workers' processes see no host file, process, network or variable, and are also confined
container    our own Docker image says so (OPENENV_WALL=container): it is the wall, and they are also confined
confinement  each worker gives up every system call but those for computing (confinement.py)
none         a plain process with limits. Refused, unless OPENENV_ACCEPT_UNSAFE=1 accepts the risk
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skyrl_gym.walls.confinement import can_filter
from skyrl_gym.walls.nursery import Interpreter, this_interpreter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]  # of the imports
PROBE = "import skyrl_gym.walls.forking"
PROBE_LIMIT_S = 20.0
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class NoWall(RuntimeError):
    """No sandbox exists on this machine, and OPENENV_ACCEPT_UNSAFE=1 does not accept running without one."""


@dataclass(frozen=True, slots=True)
class Wall:
    """The chosen wall, the reason why it is no stronger one, and the Python that runs behind it."""

    name: Literal["bubblewrap", "container", "confinement", "none"]
    reason: str
    interpreter: Interpreter

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def accepted_wall(readable: Sequence[Path] = ()) -> Wall:
    """Return the strongest wall; NoWall, with what to do, if it is "none" and nobody accepted that."""
    wall = strongest_wall(readable)
    if wall.name == "none" and os.environ.get("OPENENV_ACCEPT_UNSAFE") != "1":
        raise NoWall(
            f"programs that the model writes would run as plain processes on this machine: {wall.reason}. Run the "
            "environment in Docker or on Linux with bubblewrap (apt install bubblewrap), or accept the risk: "
            "environment.openenv.accept_unsafe=true, --accept-unsafe of the server, OPENENV_ACCEPT_UNSAFE=1 in the "
            "trainer's environment for skyrl_gym's lcb, searchcode and python tool"
        )
    return wall


def strongest_wall(readable: Sequence[Path] = ()) -> Wall:
    """Return the strongest wall of this machine. Tries bubblewrap once, in about 50 ms.

    readable: folders of ours that workers import from, which bubblewrap then shows read-only.
    """
    declared = os.environ.get("OPENENV_WALL", "")
    if declared not in ("", "container"):
        raise ValueError(f"OPENENV_WALL={declared} must be container, or not set: then the strongest wall is found")
    filtered = can_filter()
    if declared == "container":
        confined = "each worker is also confined" if filtered else "workers have limits, but no filter"
        return Wall("container", f"OPENENV_WALL=container; {confined}", this_interpreter())
    if not filtered:
        machine = f"{sys.platform} on {os.uname().machine}"
        return Wall("none", f"no system call filter here ({machine})", this_interpreter())
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        return Wall("confinement", "no bubblewrap: the command bwrap is not installed", this_interpreter())
    interpreter = behind_bubblewrap(bubblewrap, readable)
    complaint = _complaint(interpreter)
    if complaint:
        return Wall("confinement", f"bubblewrap does not work here: {complaint}", this_interpreter())
    return Wall("bubblewrap", "no host file, process or network, and each worker is also confined", interpreter)


def describe() -> str:
    """Return one line for people that says behind which wall coding_env's programs run here, and why."""
    wall = strongest_wall()
    return f"{wall}; the coding server refuses to start" if wall.name == "none" else str(wall)


def behind_bubblewrap(bubblewrap: str, readable: Sequence[Path] = ()) -> Interpreter:
    """Return a Python that sees, read-only, only the standard library, site-packages and `readable`.

    There is no /etc, /home, /proc, /tmp, no terminal, and nothing can be written. Root needs no user namespace, and
    keeps what it takes to make its workers nobody; any other user gets one. The Python is the first process of its
    namespace: all others end with it. No --die-with-parent: for it, the parent is the thread that started it. No
    --new-session: a confined worker has no terminal calls, and Linux would schedule the session as a group of its own.
    """
    python = os.path.realpath(sys.executable)
    packages = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    bound = _existing(
        Path(sys.base_prefix, "lib"), Path(sys.base_prefix, "lib64"), Path(python), *packages, HERE, *readable
    )
    rights = (
        ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL")
        if os.geteuid() == 0
        else ("--unshare-user",)
    )
    command = (
        *(bubblewrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--as-pid-1", "--hostname", "sandbox", "--cap-drop", "ALL", *rights),
        *(word for path in _parents(bound) for word in ("--perms", "0755", "--dir", str(path))),
        *_system_libraries(),
        *(word for path in bound for word in ("--ro-bind", str(path), str(path))),
        *(word for path in DEVICES for word in ("--dev-bind", path, path)),
        *("--remount-ro", "/", "--chdir", "/"),
        *("--", python, "-S", "-P"),
    )
    path = [str(ROOT), *map(str, packages)]
    return Interpreter(command, {"LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(path)})


def _system_libraries() -> list[str]:
    words = ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("lib", "lib32", "lib64"):
        words += ["--ro-bind-try", f"/usr/{name}", f"/usr/{name}"]
        place = Path("/", name)
        if place.is_symlink():
            words += ["--symlink", os.readlink(place), str(place)]
        else:
            words += ["--ro-bind-try", str(place), str(place)]
    return words


def _parents(paths: Sequence[Path]) -> list[Path]:
    """Return the parent folders to create with mode 0755 if we are root; [] for other users.

    Folders that bubblewrap creates by itself are closed to other users, and root's workers run as nobody.
    """
    if os.geteuid() != 0:
        return []
    system_paths = map(Path, ("/dev/null", "/etc/ld.so.cache", "/usr/lib"))
    return sorted({parent for path in (*paths, *system_paths) for parent in path.parents} - {Path("/")})


def _existing(*paths: Path) -> list[Path]:
    return [path for path in dict.fromkeys(paths) if path.exists()]


def _complaint(interpreter: Interpreter) -> str:
    """Return what goes wrong when this Python starts and imports a worker's module; "" if nothing does."""
    try:
        ended = subprocess.run(
            [*interpreter.command, "-c", PROBE],
            env=dict(interpreter.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no Python started behind it within {PROBE_LIMIT_S:g} s"
    except OSError as error:
        return str(error)
    words = ended.stderr.decode(errors="replace").strip().splitlines()
    return "" if ended.returncode == 0 else (words[-1] if words else f"it ended with code {ended.returncode}")
