"""Run a command that takes minutes, and let the user see that it lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping

from integrations.openenv.client.errors import OpenEnvError
from skyrl_train.visible import visible

SHOWN_AT_THE_END = 20  # lines of a command that failed
REPORT_EVERY_S = 15.0  # where nobody watches a terminal


async def run_long_command(
    *command: str, stdin: bytes = b"", timeout_s: float, environment: Mapping[str, str] | None = None
) -> None:
    """On a terminal its output is shown as it comes, elsewhere a line now and then; OpenEnvError if it fails."""
    what = " ".join(command[:2])
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "BUILDKIT_PROGRESS": "plain", **(environment or {})},
        )
    except FileNotFoundError:
        raise OpenEnvError(f"the {command[0]} command is not installed") from None
    assert process.stdin is not None
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=SHOWN_AT_THE_END)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(_feed(process.stdin, stdin), _watch(process.stdout, lines, what))
            code = await process.wait()
    except TimeoutError:
        raise OpenEnvError(f"{what} took longer than {timeout_s:g} s{_quoted(lines)}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0:
        raise OpenEnvError(f"{what} failed{_quoted(lines)}")


async def _feed(pipe: asyncio.StreamWriter, content: bytes) -> None:
    try:
        pipe.write(content)
        await pipe.drain()
    except (BrokenPipeError, ConnectionResetError):
        return  # it ended without reading all; its exit code says why
    finally:
        pipe.close()


async def _watch(pipe: asyncio.StreamReader, lines: deque[str], what: str) -> None:
    start = reported = time.monotonic()
    on_terminal, rest = sys.stdout.isatty(), b""
    while True:
        with contextlib.suppress(TimeoutError):
            chunk = await asyncio.wait_for(pipe.read(65536), REPORT_EVERY_S)
            *complete, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in complete if chunk else [rest]:
                _note(line.decode(errors="replace").rstrip(), lines, on_terminal)
            if not chunk:
                return
        if not on_terminal and time.monotonic() - reported >= REPORT_EVERY_S:
            reported = time.monotonic()
            print(f"  {what}: {reported - start:.0f} s ... {visible(lines[-1][:80]) if lines else ''}", flush=True)


def _note(line: str, lines: deque[str], on_terminal: bool) -> None:
    if line:
        lines.append(line)
        if on_terminal:
            print(f"  {visible(line)}", flush=True)


def _quoted(lines: deque[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)
