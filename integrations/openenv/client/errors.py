"""Errors between this process and an environment's server."""

from __future__ import annotations

import errno
import os
from typing import Any

MAX_SHOWN_CHARS = 2000  # of what a server says


class OpenEnvError(Exception):
    """The environment's server could not be used, or answered wrongly."""


class SessionLost(OpenEnvError):
    """The session cannot be used any more; a new one starts from `reset`."""


class ConnectionLost(SessionLost):
    """The server closed the connection or cannot be reached. `in_request`: during a request of this session."""

    def __init__(self, message: str, *, in_request: bool) -> None:
        super().__init__(message)
        self.in_request = in_request


class OutOfDescriptors(OpenEnvError):
    """Our own process has no file descriptor left for a socket; nothing is known about the server."""


class FactoryFailed(SessionLost):
    """The server runs, but could not create the environment. Its answer does not say why."""


class CapacityReached(SessionLost):
    """The server had no free slot. Servers have no queue: the client must try again later."""

    def __init__(self, message: str, max_sessions: int | None = None) -> None:
        super().__init__(message)
        self.max_sessions = max_sessions  # limit of the server process that answered, from its frame


class ServerError(OpenEnvError):
    """The server answered with an error frame.

    code VALIDATION_ERROR: the action has the wrong form; EXECUTION_ERROR: the environment's step raised.
    """

    def __init__(self, code: str, message: str, details: list[Any]) -> None:
        shown = f" {str(details)[:MAX_SHOWN_CHARS]}" if details else ""
        super().__init__(f"the environment's server answered {code}: {message[:MAX_SHOWN_CHARS]}{shown}")
        self.code = code
        self.message = message[:MAX_SHOWN_CHARS]
        self.details = details  # pydantic's list of what is wrong with which field, for VALIDATION_ERROR


def connection_error(error: OSError, words: str) -> OpenEnvError:
    """Return OutOfDescriptors if this process has no file descriptor left, else ConnectionLost."""
    if error.errno in (errno.EMFILE, errno.ENFILE) or _is_out_of_descriptors():
        return OutOfDescriptors(f"{words} (this process has no file descriptor left: ulimit -n)")
    return ConnectionLost(words, in_request=False)


def _is_out_of_descriptors() -> bool:
    """Test by opening a file: some errors, such as a failed host name look-up, do not show the cause."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as failed:
        return failed.errno in (errno.EMFILE, errno.ENFILE)
    return False


def words_of(error: BaseException) -> str:
    """Return the error's message, or its type's name if the message is empty."""
    return str(error) or type(error).__name__
