"""The refusal of a model: by its name, with the reason, in one line and before the first step."""

from __future__ import annotations

# What a family's code raises where it does not fit ours, and a library where a model's files do not fit each other.
FOREIGN_ERRORS = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError,
    ArithmeticError, EOFError, NameError, SyntaxError, StopIteration,
)  # fmt: skip


class ModelRefused(ValueError):
    """This model cannot be trained here; the message names it and says why, in one line."""


def one_line(error: BaseException, most: int = 300) -> str:
    """Return the error's text on one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."
