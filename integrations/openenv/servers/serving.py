"""The main loop of our servers: bind, print the real address, serve, and end with the parent process."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integrations.openenv.client.descriptors import num_affordable
from integrations.openenv.servers.callers import for_local_callers

if TYPE_CHECKING:
    from fastapi import FastAPI

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DESCRIPTORS_PER_SESSION = 4  # a connection and the sockets of a worker


def serve(make_app: Callable[[int], FastAPI], description: str) -> None:
    """Parse the command line, then serve `make_app(max_sessions)` until killed."""
    serve_as(server_parser(description).parse_args(), make_app)


def serve_as(arguments: argparse.Namespace, make_app: Callable[[int], FastAPI]) -> None:
    """Serve `make_app(max_sessions)` until killed, as the parsed command line says."""
    if arguments.exit_with_parent:
        exit_with_parent()
    if arguments.accept_unsafe:
        os.environ["OPENENV_ACCEPT_UNSAFE"] = "1"
    listening, url = _bound(arguments)
    app = make_app(_affordable(arguments.max_sessions))
    write_nan_as_such()
    print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
    sys.stdout = sys.stderr  # the address is the only line on stdout
    import uvicorn

    config: dict[str, Any] = {"log_level": "warning", "ws_ping_interval": None, "ws_per_message_deflate": False}
    local = for_local_callers(
        _without_late_closes(app), None if arguments.uds else arguments.host, arguments.allow_host
    )
    uvicorn.Server(uvicorn.Config(local, **config)).run(sockets=[listening])


def write_nan_as_such() -> None:
    """Let openenv-core write NaN and infinity by their names, not as null, which a client would take for no reward."""
    try:
        from openenv.core.env_server.types import WSObservationResponse
    except ImportError:  # an app of another kind, or from before 2026
        return
    WSObservationResponse.model_config["ser_json_inf_nan"] = "constants"
    WSObservationResponse.model_rebuild(force=True)


def _without_late_closes(app: Any) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """Return the app without the exception that openenv-core raises when it closes an already closed connection."""
    from starlette.websockets import WebSocketDisconnect

    async def served(scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(WebSocketDisconnect):
            await app(scope, receive, send)

    return served


def _affordable(max_sessions: int) -> int:
    """Return the smaller of `max_sessions` and the sessions that the limit of open files allows."""
    most = num_affordable(DESCRIPTORS_PER_SESSION)
    if most is None or most >= max_sessions:
        return max_sessions
    print(f"at most {most} sessions at once, by the limit of open files (ulimit -n)", file=sys.stderr)
    return most


def _bound(arguments: argparse.Namespace) -> tuple[socket.socket, str]:
    if arguments.uds:
        Path(arguments.uds).unlink(missing_ok=True)  # left by a killed server
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(arguments.uds)
        Path(arguments.uds).chmod(0o666)  # a container has another user; the folder's mode decides who may connect
        listening.listen(1024)
        return listening, f"unix:{arguments.uds}"
    listening = socket.create_server((arguments.host, arguments.port), backlog=1024)
    host, port = listening.getsockname()[:2]
    return listening, f"http://{host}:{port}"


def exit_with_parent() -> None:
    """Make this process end when its parent ends, however it ends: then stdin closes. Linux also sends a signal."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # out of memory, the kernel kills a server before the trainer
            Path("/proc/self/oom_score_adj").write_text("500")
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch_stdin() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch_stdin, name="parent-watch", daemon=True).start()


def server_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every server has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the protocol has no password")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the first line of output says which")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that clients may call this machine by"
    )
    parser.add_argument("--uds", metavar="PATH", help="listen on this file, not on a port: no network needed")
    parser.add_argument(
        "--max-sessions", type=int, default=int(os.environ.get("MAX_CONCURRENT_ENVS", "256")), help="sessions at once"
    )
    parser.add_argument("--exit-with-parent", action="store_true", help="exit when stdin closes (set by the pool)")
    parser.add_argument(
        "--accept-unsafe",
        action="store_true",
        help="run a model's programs without a wall where this machine has none (coding_env; OPENENV_ACCEPT_UNSAFE=1)",
    )
    return parser
