"""Typed clients for playing by hand: EchoEnv, CodingEnv, OpenSpielEnv and SumoRLEnv, async or not.

async with await EchoEnv.local() as env:            with EchoEnv.sync(EchoEnv.local()) as env:
    await env.reset()                                   env.reset()
    result = await env.step(EchoAction("hello"))        result = env.step(EchoAction("hello"))
    result.observation.echoed                           result.observation.echoed
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from integrations.openenv.catalog.coding import CodeAction, CodeObservation, CodingEntry
from integrations.openenv.catalog.echo import EchoAction, EchoEntry, EchoObservation
from integrations.openenv.catalog.games import OpenSpielObservation
from integrations.openenv.catalog.openspiel import OpenSpielAction, OpenSpielEntry
from integrations.openenv.catalog.sumo_rl import SumoAction, SumoEntry, SumoObservation
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.session import OpenEnvClient, StepResult, open_session
from integrations.openenv.hosting.containers import Container
from integrations.openenv.hosting.server import Server
from integrations.openenv.hosting.server_process import ServerProcess


class TypedAction(Protocol):
    """An action that can be turned into the fields that a server is sent."""

    def fields(self) -> dict[str, Any]: ...


ActionT = TypeVar("ActionT", bound=TypedAction)
ObservationT = TypeVar("ObservationT")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TypedResult(Generic[ObservationT]):
    """The result of `reset` and `step`."""

    observation: ObservationT
    reward: float | None  # None: the server pays nothing here
    done: bool


class TypedEnv(Generic[ActionT, ObservationT]):
    """One session with one environment. `close` also stops the server or container that was started for it."""

    image: ClassVar[str]
    server_module: ClassVar[str]
    parse_observation: ClassVar[Callable[[dict[str, Any]], Any]]

    def __init__(self, url: str, owned: Server | None = None, *, step_timeout_s: float = 30.0) -> None:
        self.url = url
        self.step_timeout_s = step_timeout_s
        self._owned = owned
        self._client: OpenEnvClient | None = None

    @classmethod
    async def from_url(cls, url: str) -> Self:
        """Make a client of a server that runs already."""
        return cls(url)

    @classmethod
    async def local(cls, *, timeout_s: float = 60.0) -> Self:
        """Start a server of ours for this client, without Docker."""
        server = await ServerProcess.start(cls.server_module, max_sessions=1, timeout_s=timeout_s)
        return cls(server.url, server)

    @classmethod
    async def from_docker_image(
        cls, image: str | None = None, *, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> Self:
        """Start a container of this image (by default the official one) for this client."""
        container = await Container.start(image or cls.image, env=env, timeout_s=timeout_s)
        return cls(container.url, container)

    async def reset(self, **kwargs: Any) -> TypedResult[ObservationT]:
        """Start a new episode, in the same session if it is not lost."""
        if self._client is not None and self._client.lost is None:
            return self._typed(await self._client.reset(**kwargs))
        self._client, first = await open_session(self.url, kwargs, step_timeout_s=self.step_timeout_s)
        return self._typed(first)

    async def step(self, action: ActionT) -> TypedResult[ObservationT]:
        return self._typed(await self._session().step(action.fields()))

    async def state(self) -> dict[str, Any]:
        return await self._session().state()

    async def close(self) -> None:
        client, self._client = self._client, None
        owned, self._owned = self._owned, None
        if client is not None:
            await client.close()
        if owned is not None:
            await asyncio.to_thread(owned.stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @classmethod
    def sync(cls, start: Coroutine[Any, Any, Self]) -> SyncEnv[ActionT, ObservationT]:
        """Return a client without async methods: `with EchoEnv.sync(EchoEnv.local()) as env: env.reset()`."""
        return SyncEnv(run_in_background(start))

    def _session(self) -> OpenEnvClient:
        if self._client is None:
            raise RuntimeError(f"{type(self).__name__}: reset() first")
        return self._client

    def _typed(self, result: StepResult) -> TypedResult[ObservationT]:
        return TypedResult(type(self).parse_observation(result.observation), result.reward, result.done)


class SyncEnv(Generic[ActionT, ObservationT]):
    """A TypedEnv with blocking methods. Its session lives on the event loop of a background thread."""

    def __init__(self, env: TypedEnv[ActionT, ObservationT]) -> None:
        self._env = env

    @property
    def url(self) -> str:
        return self._env.url

    def reset(self, **kwargs: Any) -> TypedResult[ObservationT]:
        return run_in_background(self._env.reset(**kwargs))

    def step(self, action: ActionT) -> TypedResult[ObservationT]:
        return run_in_background(self._env.step(action))

    def state(self) -> dict[str, Any]:
        return run_in_background(self._env.state())

    def close(self) -> None:
        run_in_background(self._env.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class EchoEnv(TypedEnv[EchoAction, EchoObservation]):
    """Client of echo_env."""

    image = EchoEntry.image
    server_module = EchoEntry.server_module
    parse_observation = EchoObservation.from_fields


class CodingEnv(TypedEnv[CodeAction, CodeObservation]):
    """Client of coding_env."""

    image = CodingEntry.image
    server_module = CodingEntry.server_module
    parse_observation = CodeObservation.from_fields


class OpenSpielEnv(TypedEnv[OpenSpielAction, OpenSpielObservation]):
    """Client of openspiel_env. `reset(seed=3, game="tic_tac_toe")` with our own server."""

    image = OpenSpielEntry.image
    server_module = OpenSpielEntry.server_module
    parse_observation = OpenSpielObservation.from_fields


class SumoRLEnv(TypedEnv[SumoAction, SumoObservation]):
    """Client of sumo_rl_env. `reset(seed=3, network="cologne1", delta_time=10)` with our own server."""

    image = SumoEntry.image
    server_module = SumoEntry.server_module
    parse_observation = SumoObservation.from_fields
