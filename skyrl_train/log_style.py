"""One style for all that is said in words: log lines of ours and of libraries, warnings, refusals.

20:29:11 INFO    engine: text        when, how bad, who says it, what
                 that goes on        a terminal's lines are broken between words; elsewhere a line stays whole
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any, TextIO

from loguru import logger

WIDTH = 100  # columns of a terminal's lines, and fewer where it is narrower
INDENT = " " * 17  # behind time and level
FORMAT = "{time:HH:mm:ss} {level: <7} {extra[who]}: {message}\n{exception}"
OURS = ("skyrl_train", "skyrl_gym", "integrations")
WORD = re.compile(r"(\s*)((?:`[^`\n]*`|\S)+)")  # what stands between backticks is copied, so it is one word


def log_format(record: Any) -> str:
    """Return loguru's format of a record, with the name of who says it added."""
    record["extra"].setdefault("who", who_of(record["name"] or "python"))
    return FORMAT


def who_of(module: str) -> str:
    """Return the room of ours, or the package, that a module belongs to: skyrl_train.engine.pool -> engine."""
    first, *rest = module.split(".")
    return rest[0] if first in OURS and rest else first


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Return the text in lines of at most `width`, broken between words; later parts of a line begin with `indent`.

    Longer words, what stands between backticks, and lines that begin with two spaces stay whole: they are to be copied.
    width: None leaves the text as it is.
    """
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _parts(line, width, indent))


def _parts(line: str, width: int, indent: str) -> list[str]:
    if len(line) <= width or line.startswith("  "):
        return [line]
    parts: list[str] = []
    for space, word in WORD.findall(line):
        if parts and len(parts[-1]) + len(space) + len(word) <= width:
            parts[-1] += space + word
        else:
            parts.append(f"{indent if parts else ''}{word}")
    return parts


def width_of(stream: Any) -> int | None:
    """Return the columns of a terminal, at most WIDTH; None for anything else."""
    try:
        return min(WIDTH, os.get_terminal_size(stream.fileno()).columns) or WIDTH if stream.isatty() else None
    except (AttributeError, OSError, ValueError):  # no file behind it, or a closed one
        return None


class LibraryLogs(logging.Handler):
    """Passes on what a library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in logging.getLevelNamesMapping() else record.levelno
        said = logger.bind(who=who_of(record.name)).opt(exception=record.exc_info)
        said.log(level, "{}", record.getMessage())


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a warning of Python. It takes the place of warnings.showwarning, whose parameters these are."""
    del file, line
    inside = re.search(r"site-packages[/\\](\w+)", filename)
    who = inside[1] if inside else f"{os.path.basename(filename)}, line {lineno}"
    logger.bind(who=who).warning("{}", f"{category.__name__}: {message}")


def use_our_logs(*packages: str) -> None:
    """Let packages that have set up logs of their own write in our style. Call it after they are imported."""
    for package in packages:
        theirs = logging.getLogger(package)
        theirs.handlers.clear()
        theirs.propagate = True
