"""Untrusted text made safe to print: nothing in it can steer a terminal or a page, or hide from the reader.

What models, servers and data sets say reaches a terminal through here only: logs, tracebacks, `show`, `play`, `check`.
"""

from __future__ import annotations

import argparse
import html
import logging
import sys
import sysconfig
import traceback
import unicodedata
import warnings
from types import TracebackType
from typing import Any, NoReturn

from loguru import logger

from skyrl_train.log_style import INDENT, LibraryLogs, log_format, show_warning, width_of, wrapped

MAX_WORDS = 1000  # characters of an error that are kept


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


def words_of(error: BaseException, *, with_place: bool = True) -> str:
    """Return the error on one line: `NameError: name 'x' is not defined (my_env.py:12 in step: return x)`."""
    described = traceback.TracebackException.from_exception(error)
    lines = "".join(described.format_exception_only()).split("\n")
    words = " ".join(line.strip() for line in lines if line.strip())
    place = _place(described.stack) if with_place else ""
    return kept_words(words) + (f" ({kept_words(place)})" if place else "")


def _place(stack: traceback.StackSummary) -> str:
    """Return the innermost frame that is neither Python's nor a library's, or else the innermost one."""
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    own = [frame for frame in stack if not frame.filename.startswith(libraries)]
    if not stack:
        return ""
    frame = (own or list(stack))[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"


def kept_words(text: str) -> str:
    """Return the text of an error `visible`, and not much longer than MAX_WORDS."""
    return visible(shortened(text, MAX_WORDS))


def _is_plain(character: str) -> bool:
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
