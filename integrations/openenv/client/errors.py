"""What can go wrong between us and an environment."""

from __future__ import annotations

import errno
import os
from typing import Any

MAX_SHOWN_CHARS = 2000  # of what a server says


class OpenEnvError(Exception):
    """Something between us and the environment went wrong."""


class SessionLost(OpenEnvError):
    """The session cannot be used any more; a new one starts from `reset`."""


class ConnectionLost(SessionLost):
    """The server went away, or cannot be reached. `in_request`: while it had a request of this session to answer."""

    def __init__(self, message: str, *, in_request: bool) -> None:
        super().__init__(message)
        self.in_request = in_request


class OutOfDescriptors(OpenEnvError):
    """This process may open no more files or sockets. It says nothing about the server."""


class FactoryFailed(SessionLost):
    """The server is there, but could not make the environment. Its answer does not say why."""


class CapacityReached(SessionLost):
    """The server had no free slot. It queues nobody: try again later."""

    def __init__(self, message: str, max_sessions: int | None = None) -> None:
        super().__init__(message)
        self.max_sessions = max_sessions  # as the server's frame tells it: of the worker that answered


class ServerError(OpenEnvError):
    """The server's error frame. VALIDATION_ERROR: the action has the wrong form; EXECUTION_ERROR: step raised."""

    def __init__(self, code: str, message: str, details: list[Any]) -> None:
        shown = f" {str(details)[:MAX_SHOWN_CHARS]}" if details else ""
        super().__init__(f"the environment's server answered {code}: {message[:MAX_SHOWN_CHARS]}{shown}")
        self.code = code
        self.message = message[:MAX_SHOWN_CHARS]
        self.details = details  # pydantic's list of what is wrong with which field, for VALIDATION_ERROR


def connection_error(error: OSError, words: str) -> OpenEnvError:
    """Tell our own lack of file descriptors from a server that cannot be reached."""
    if error.errno in (errno.EMFILE, errno.ENFILE) or _is_out_of_descriptors():
        return OutOfDescriptors(f"{words} (this process has no file descriptor left: ulimit -n)")
    return ConnectionLost(words, in_request=False)


def _is_out_of_descriptors() -> bool:
    """Some errors hide it, such as that of a host name that could not be looked up."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as failed:
        return failed.errno in (errno.EMFILE, errno.ENFILE)
    return False


def words_of(error: BaseException) -> str:
    """What it says, or its type's name."""
    return str(error) or type(error).__name__
