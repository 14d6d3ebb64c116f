"""Untrusted text made safe to print: nothing in it can steer a terminal or a page, or hide from the reader.

What models, servers and data sets say reaches a terminal through here only: logs, tracebacks, `show`, `play`, `check`.
"""

from __future__ import annotations

import argparse
import html
import logging
import sys
import traceback
import unicodedata
import warnings
from types import TracebackType
from typing import Any, NoReturn

from loguru import logger

from skyrl_train.log_style import INDENT, LibraryLogs, log_format, show_warning, width_of, wrapped


def visible(text: str) -> str:
    """Return the text with control, direction and other invisible characters as pictures or codes.

    Newline and tab stay as they are.

    "a\\x1b[31m" -> "a␛[31m", "\\u202e" -> "\\\\u202e"
    """
    return "".join(character if _is_plain(character) else _picture(character) for character in text)


def escaped(text: str) -> str:
    """Return `visible` text escaped for a place in HTML between tags or in a quoted attribute."""
    return html.escape(visible(text), quote=True)


def log_to(sink: Any) -> None:
    """Send log lines to the sink, a stream or a function, and nowhere else, in our style."""
    write = sink if callable(sink) else lambda text: sink.write(wrapped(text, width_of(sink), INDENT))
    logger.remove()
    logger.add(lambda message: write(visible(message)), format=log_format, level="INFO")


def make_errors_visible() -> None:
    """Send logs and warnings, also those of libraries, and the traceback that ends the process to stderr, `visible`."""
    log_to(sys.stderr)
    sys.excepthook = _print_visible
    logging.lastResort = LibraryLogs(logging.WARNING)  # for libraries without a handler of their own
    setattr(warnings, "showwarning", show_warning)  # noqa: B010 (ty takes it for one function alone)


class Parser(argparse.ArgumentParser):
    """Parser of a command line whose errors quote its words, names of files among them, `visible`."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def say(text: str) -> None:
    """Print words for the person to stderr: what is refused, why it ended, how to go on."""
    print(wrapped(visible(text), width_of(sys.stderr)), file=sys.stderr)


def _print_visible(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    if sys.stderr is not None:  # as in a process that was started without one
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, frames))))


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"


def _is_plain(character: str) -> bool:
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
