"""Output that cannot end a run: a terminal that has gone, a closed pipe, a full disk, or letters it has no code for."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_FAILURES = (OSError, ValueError)  # ValueError: the stream was closed


@contextmanager
def lasting_output() -> Generator[None]:
    """Within the block no printing raises: what fails is dropped, letters without a code come as \\u2192."""
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
