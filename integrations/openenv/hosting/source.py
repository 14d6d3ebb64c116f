"""The source of an environment's servers: a module, an image or an address."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSource:
    """One or more ways to serve an environment; `openenv.runtime` decides which of them the pool takes.

    Episodes with equal sources share servers.
    """

    name: str  # of the environment, for messages and metrics
    module: str | None = None  # a server of ours, for `python -m`
    arguments: tuple[str, ...] = ()  # further arguments of that command
    image: str | None = None  # of a container that serves it
    variables: tuple[tuple[str, str], ...] = ()  # environment variables of that container
    url: str | None = None  # of a server that runs already
    lack: str | None = None  # why our own server cannot run on this machine, and what to type

    def __post_init__(self) -> None:
        if not (self.module or self.image or self.url):
            raise ValueError(f"{self.name}: a server needs a module, an image or a url")
