"""`skyrl view [FOLDER...]`: opens a local web page with the runs in these folders."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn

from skyrl_train.console import lasting_output
from skyrl_train.files import told
from skyrl_train.run.run_folder import USUAL_FOLDERS, usual_folders
from skyrl_train.view.app import make_app
from skyrl_train.view.folders import given_folder
from skyrl_train.view.library import Library
from skyrl_train.visible import Parser, say, visible

PORT = 8265 + 100  # of the first try


def main(argv: list[str]) -> int:
    """Serve the page until Ctrl-C. Return 2 if the folders or the port cannot be used."""
    options = _parser().parse_args(argv)
    with lasting_output():
        try:
            roots = list(dict.fromkeys(given_folder(text) for text in options.folder or usual_folders()))
            listener = _listener(options.port)
        except (ValueError, OSError) as error:
            say(f"skyrl view: {told(error)}")
            return 2
        with listener:
            return _serve(roots, listener, opens=not options.no_open)


class _AnnouncingServer(uvicorn.Server):
    """Calls `announce` when it answers: from then on it takes Ctrl-C itself, in an event loop that runs."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.announce()


def _serve(roots: list[Path], listener: socket.socket, *, opens: bool) -> int:
    library = Library(roots)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def announce() -> None:
        count = len(library.entries)
        print(visible(f"{count} {'run' if count == 1 else 'runs'} in {', '.join(str(root) for root in roots)}"))
        print(f"{address}   (only from this machine; Ctrl-C ends it)", flush=True)
        if opens and _has_a_screen():
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()

    library.start()
    config = uvicorn.Config(
        make_app(library), log_config=None, log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    try:
        _AnnouncingServer(config, announce).run(sockets=[listener])
    finally:
        library.close()
    return 0


def _listener(port: int | None) -> socket.socket:
    """Return a socket that listens on loopback: the given port, else the first free one of ten, else any."""
    for number in [port] if port is not None else [*range(PORT, PORT + 10), 0]:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", number))
            listener.listen(128)
            return listener
        except (OSError, OverflowError) as error:
            listener.close()
            if port is not None:
                raise ValueError(f"--port {port} cannot be used ({error}); give another one or leave it out") from error
    raise ValueError("no port of this machine is free")


def _has_a_screen() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skyrl view",
        description="Open a local web page: runs, their curves over each other, every episode. Nothing is changed but "
        "an index beside the trajectories (.view.sqlite), which may be deleted at any time.",
    )
    about = f"a run (trainer.ckpt_path), or a folder that holds runs; default: {' and '.join(USUAL_FOLDERS)}"
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help=about)
    parser.add_argument("--port", type=int, help=f"default: the first free one from {PORT} on")
    parser.add_argument("--no-open", action="store_true", help="only print the address, open no browser")
    return parser
