"""What can go wrong between us and an environment."""

from __future__ import annotations

from typing import Any


class OpenEnvError(Exception):
    """Something between us and the environment went wrong."""


class SessionLost(OpenEnvError):
    """The session cannot be used any more; a new one starts from `reset`."""


class CapacityReached(SessionLost):
    """The server had no free slot. It queues nobody: try again later."""

    def __init__(self, message: str, max_sessions: int | None = None) -> None:
        super().__init__(message)
        self.max_sessions = max_sessions  # as the server's frame tells it: of the worker that answered


class ServerError(OpenEnvError):
    """The server's error frame. VALIDATION_ERROR: the action has the wrong form; EXECUTION_ERROR: step raised."""

    def __init__(self, code: str, message: str, details: list[Any]) -> None:
        super().__init__(f"the environment's server answered {code}: {message}" + (f" {details}" if details else ""))
        self.code = code
        self.message = message
        self.details = details  # pydantic's list of what is wrong with which field, for VALIDATION_ERROR


def words_of(error: BaseException) -> str:
    """What it says, or its type's name."""
    return str(error) or type(error).__name__
