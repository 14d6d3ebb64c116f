"""One environment server as a child process on a free port. It ends with this process, even if that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from integrations.openenv.client.addresses import is_healthy
from integrations.openenv.hosting.reaping import OWNER_VARIABLE, this_process
from integrations.openenv.hosting.server import ServerStartFailed

REPOSITORY_ROOT = Path(__file__).resolve().parents[3]
PASSED_ON = ("PATH", "TMPDIR", "SYSTEMROOT")  # nothing else of our environment reaches the server


class ServerProcess:
    """A running server process. `start` makes one, `stop` ends it, and it ends by itself when this process dies."""

    num_workers: int | None = 1

    def __init__(self, module: str, process: subprocess.Popen[bytes], errors: IO[bytes], url: str) -> None:
        self.module = module
        self.url = url
        self._process = process
        self._errors = errors

    @classmethod
    async def start(
        cls, module: str, *, arguments: Sequence[str] = (), max_sessions: int, timeout_s: float
    ) -> ServerProcess:
        """Run `python -m module` until it announces its address and answers."""
        ours = ["--exit-with-parent", "--max-sessions", str(max_sessions)]
        errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the server)
        process = subprocess.Popen(  # noqa: ASYNC220  (milliseconds; from a thread, PR_SET_PDEATHSIG would misfire)
            [sys.executable, "-P", "-m", module, *ours, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(),
            cwd=tempfile.gettempdir(),
            start_new_session=True,  # Ctrl-C reaches only this process
        )
        server = cls(module, process, errors, url="")
        try:
            async with asyncio.timeout(timeout_s):
                server.url = await server._announced_url()
                while not await is_healthy(server.url):
                    server._check_running()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            words = server.log_end()
            server.stop()
            raise ServerStartFailed(
                f"{module} did not answer within {timeout_s:g} s (openenv.startup_timeout_s){words}"
            ) from None
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def log_end(self) -> str:
        """Return the end of the server's stderr, for an error message."""
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        text = self._errors.read()[-2000:].decode(errors="replace").strip()
        return f"; the end of its log:\n{text}" if text else ""

    def stop(self) -> None:
        """End the server at once. Its sessions are lost."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    async def _announced_url(self) -> str:
        assert self._process.stdout is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(self._process.stdout.fileno()), "rb")
        )
        try:
            line = await reader.readline()
        finally:
            transport.close()
        if not line:
            self._process.wait()
        self._check_running()
        try:
            return str(json.loads(line)["url"])
        except (ValueError, KeyError, TypeError):
            raise ServerStartFailed(f"{self.module} announced {line[:200]!r}, not a JSON line with a url") from None

    def _check_running(self) -> None:
        if not self.is_running:
            raise ServerStartFailed(f"{self.module} ended with code {self._process.returncode}{self.log_end()}")


def _environment() -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    own = {"LANG": "C.UTF-8", "PYTHONPATH": str(REPOSITORY_ROOT), "HOME": tempfile.gettempdir()}
    return {**own, OWNER_VARIABLE: str(this_process()), **passed_on}
