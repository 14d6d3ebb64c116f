"""The pool's interface to a server, which is a process, a container or only an address."""

from __future__ import annotations

from typing import Protocol

from integrations.openenv.client.errors import OpenEnvError


class ServerStartFailed(OpenEnvError):
    """The server ended, or did not answer in time."""


class ServersGivenUp(ServerStartFailed):
    """So many servers of an environment failed, one after the other, that no further one is started."""


class Server(Protocol):
    """A server that has answered once. The methods may block for a moment: call them from a thread."""

    url: str
    num_workers: int | None  # processes behind the address, each with sessions of its own; None: unknown

    @property
    def is_running(self) -> bool: ...

    def log_end(self) -> str:
        """Return the end of its log after "; the end of its log:", for an error message; "" if there is none."""
        ...

    def stop(self) -> None:
        """End the server at once. Its sessions are lost."""
        ...


class GivenServer:
    """A server that somebody else started at an address; stopping it is left to them."""

    num_workers: int | None = None
    is_running = True

    def __init__(self, url: str) -> None:
        self.url = url

    def log_end(self) -> str:
        return ""

    def stop(self) -> None:
        pass
