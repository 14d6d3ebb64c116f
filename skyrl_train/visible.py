"""Untrusted text made safe to look at: nothing in it can steer a terminal, a page, or the reader's eyes.

What models, servers and data sets say reaches a terminal through here only: logs, tracebacks, `show`, `play`, `check`.
"""

from __future__ import annotations

import html
import logging
import sys
import traceback
import unicodedata
from types import TracebackType
from typing import Any

from loguru import logger


def visible(text: str) -> str:
    """Control, direction and other invisible characters as pictures or codes; newline and tab stay.

    "a\\x1b[31m" -> "a␛[31m", "\\u202e" -> "\\\\u202e"
    """
    return "".join(character if _is_plain(character) else _picture(character) for character in text)


def escaped(text: str) -> str:
    """As `visible`, for a place in HTML between tags or in a quoted attribute."""
    return html.escape(visible(text), quote=True)


def log_to(sink: Any) -> None:
    """Log lines go there, and nowhere else; short, because a person reads them."""
    write = sink if callable(sink) else sink.write
    logger.remove()
    logger.add(lambda message: write(visible(message)), format="{time:HH:mm:ss} {level: <7} {message}", level="INFO")


def make_errors_visible() -> None:
    """Print what this process logs and what ends it as `visible`, on stderr; what libraries log as well."""
    log_to(sys.stderr)
    sys.excepthook = _print_visible
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleFormatter())


def _print_visible(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    if sys.stderr is not None:  # as in a process that was started without one
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, frames))))


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"


def _is_plain(character: str) -> bool:
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
