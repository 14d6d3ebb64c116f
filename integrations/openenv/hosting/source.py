"""Where one environment can be served from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSource:
    """A server of ours, an image, an address, or several of them: the pool takes what `openenv.runtime` says.

    Episodes with equal sources share servers.
    """

    name: str  # of the environment, for messages and metrics
    module: str | None = None  # a server of ours, for `python -m`
    arguments: tuple[str, ...] = ()  # of that command, beside the pool's own
    image: str | None = None  # of a container that serves it
    variables: tuple[tuple[str, str], ...] = ()  # environment variables of that container
    url: str | None = None  # where it runs already

    def __post_init__(self) -> None:
        if not (self.module or self.image or self.url):
            raise ValueError(f"{self.name}: a server needs a module, an image or a url")
