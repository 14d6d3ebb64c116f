"""Output that cannot end a run: a terminal that has gone, a closed pipe, a full disk, or letters it has no code for."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LEAST_COLUMNS = 20
_FAILURES = (OSError, ValueError)  # ValueError: the stream was closed

IN_CHECKOUT = (Path(__file__).parents[1] / "pyproject.toml").is_file()


def as_typed(command: str) -> str:
    """Return a command as it is typed here: behind `uv run` in a checkout, alone where pip has installed it."""
    return f"uv run {command}" if IN_CHECKOUT else command


def shell_line(words: Iterable[str]) -> str:
    """Return words as a line for a shell; what holds single quotes stands in double ones: "data.val_data=['x']"."""
    quoted = (f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word) for word in words)
    return " ".join(quoted)


def install_extra(extra: str) -> str:
    """Return the command that installs an extra of this project: uv's in a checkout, pip's elsewhere."""
    return f"uv sync --inexact --extra {extra}" if IN_CHECKOUT else f"pip install 'skyrl-train[{extra}]'"


def print_json(value: Any) -> None:
    """Print a value as JSON that every reader takes: a number that is not finite becomes null."""
    print(json.dumps(_finite(json.loads(json.dumps(value, default=str))), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def lasting_output() -> Generator[None]:
    """Within the block no printing raises: what fails is dropped, letters without a code come as \\u2192.

    A COLUMNS in which no line fits, as 0 of a terminal without a size, is no longer in the environment.
    """
    if (columns := os.environ.get("COLUMNS", "")).isdecimal() and int(columns) < LEAST_COLUMNS:
        del os.environ["COLUMNS"]
    usual = sys.stdout, sys.stderr
    lasting = [LastingStream(stream) for stream in usual]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.settle()
        sys.stdout, sys.stderr = usual


class LastingStream:
    """A text stream, or none where the process was started without one, whose errors are kept from its writers."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream if stream is not None else io.StringIO()
        self._is_none = stream is None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if not self._is_none:
            with suppress(*_FAILURES):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*_FAILURES):
            self._stream.flush()

    def settle(self) -> None:
        """Let go of what could not be written: the interpreter would try again at its end, and exit with status 120."""
        try:
            self._stream.flush()
        except _FAILURES:
            with suppress(*_FAILURES), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
