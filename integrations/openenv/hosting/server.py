"""What the pool knows of a server, whether it is a process, a container or only an address."""

from __future__ import annotations

from typing import Protocol

from integrations.openenv.client.errors import OpenEnvError


class ServerStartFailed(OpenEnvError):
    """The server ended, or did not answer in time."""


class Server(Protocol):
    """A server that has answered once. Everything here may take a moment: call it from a thread."""

    url: str
    num_workers: int | None  # processes behind the address, each with sessions of its own; None: unknown

    @property
    def is_running(self) -> bool: ...

    def last_words(self) -> str:
        """The end of what it wrote, behind "; its last words:", or nothing."""
        ...

    def stop(self) -> None:
        """End it, at once. Its sessions are lost."""
        ...


class GivenServer:
    """An address. Who started the server ends it."""

    num_workers: int | None = None
    is_running = True

    def __init__(self, url: str) -> None:
        self.url = url

    def last_words(self) -> str:
        return ""

    def stop(self) -> None:
        pass
