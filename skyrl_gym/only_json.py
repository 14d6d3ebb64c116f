"""The standard output of `--json`: one JSON document and nothing else, whatever the user's code prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def prints_to_stderr(*, wanted: bool = True) -> Generator[None]:
    """Send what is printed within the block to stderr: by Python, by C libraries and by child processes."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    try:
        usual = os.dup(1)
    except OSError:  # the process was started without an output
        with redirect_stdout(sys.stderr):
            yield
        return
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(usual, 1)
        os.close(usual)
