"""Client of OpenEnv's session protocol over one WebSocket.

One connection is one session is one environment instance; one JSON frame goes out, one comes back, in order. So a
session that missed an answer cannot be used again: a late answer would be taken for the next one. After a time-out, a
close, a malformed frame or a cancelled wait, every call raises SessionLost.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.protocol import State

from integrations.openenv.client.addresses import http_url, websocket_url
from integrations.openenv.client.deadline import Deadline
from integrations.openenv.client.errors import (
    CapacityReached,
    ConnectionLost,
    FactoryFailed,
    OpenEnvError,
    ServerError,
    SessionLost,
    connection_error,
    words_of,
)
from integrations.openenv.client.http_request import LOOPBACK_HOSTS
from integrations.openenv.client.old_http import WS_REFUSED, OldHttpSession, speaks_old_http
from integrations.openenv.client.unix_socket import socket_path
from skyrl_gym.contract import WrongAnswer, checked_reward

MAX_FRAME_BYTES = 100 * 1024 * 1024  # what the official client accepts; an Atari screen as JSON is 0.2 MB
FATAL_CODES = {"CAPACITY_REACHED", "FACTORY_ERROR", "SESSION_ERROR"}  # after these the server closes the connection


@dataclass(frozen=True, slots=True)
class StepResult:
    """An observation frame: the answer to `reset` and `step`."""

    observation: dict[str, Any]
    reward: float | None  # None: no reward for this step; the official server also writes NaN as null
    done: bool
    metadata: dict[str, Any] = field(default_factory=dict)


class OpenEnvClient:
    """One session with one environment: `connect`, `reset`, then `step` until done; one request at a time."""

    def __init__(self, url: str, *, connect_timeout_s: float = 10.0, step_timeout_s: float = 30.0) -> None:
        self.url = url
        self.connect_timeout_s = connect_timeout_s
        self.step_timeout_s = step_timeout_s  # of each reset, step and state
        self._socket: ClientConnection | OldHttpSession | None = None
        self._lost: str | None = "it was never connected"  # why the session is unusable
        self._deadline = Deadline(step_timeout_s)

    async def connect(self) -> None:
        """Open the connection. A full server says so only in the answer to the next request (CapacityReached)."""
        if self._socket is not None:
            raise SessionLost(f"{self.url}: a client is one session; make a new client for a new one")
        try:
            self._socket = await _opening(self.url, self.connect_timeout_s)
        except (OSError, InvalidHandshake, InvalidURI, TimeoutError) as refused:
            self._socket = await self._old_session(refused)
            if self._socket is None:
                words = f"cannot connect to the environment server at {self.url}: {words_of(refused)}"
                if isinstance(refused, OSError):
                    raise connection_error(refused, words) from refused
                raise ConnectionLost(words, in_request=False) from refused
        self._lost = None

    async def reset(self, **kwargs: Any) -> StepResult:
        """Start the episode. The server drops keywords that the environment's reset does not take, `seed` included."""
        return _step_result(await self._request("reset", "observation", kwargs), self._lose, is_paid=False)

    async def step(self, action: dict[str, Any]) -> StepResult:
        """Send an action, given by its fields, and return its result."""
        return _step_result(await self._request("step", "observation", action), self._lose)

    async def state(self) -> dict[str, Any]:
        """Return the environment's state: episode_id, step_count and fields of its own."""
        return await self._request("state", "state", None)

    async def mcp(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a JSON-RPC request to the environment's MCP tools, such as tools/list."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = await self._request("mcp", "mcp", request)
        result = answer.get("result")
        if not isinstance(result, dict):
            raise OpenEnvError(f"{self.url}: {method} gave {str(answer.get('error', answer))[:300]}")
        return result

    async def close(self) -> None:
        """End the session. The server frees the slot. May be called twice, and never raises."""
        socket, self._socket = self._socket, None
        self._deadline.stop()
        if self._lost is None:
            self._lost = "it was closed"
        if socket is not None:
            await socket.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def lost(self) -> str | None:
        """The reason why the session is unusable, or None."""
        return self._lost

    async def _request(self, kind: str, answer_kind: str, data: dict[str, Any] | None) -> dict[str, Any]:
        if self._lost is not None or self._socket is None:
            raise SessionLost(f"the session with {self.url} cannot be used: {self._lost}")
        frame = json.dumps({"type": kind} if data is None else {"type": kind, "data": data})
        self._lost = f"a {kind} request is under way or was interrupted"  # stays true unless the answer arrives
        was_open = not isinstance(self._socket, ClientConnection) or self._socket.state is State.OPEN
        try:
            with self._deadline:
                answer = await _exchange(self._socket, frame)
        except TimeoutError:
            raise self._lose(f"no answer to {kind} within {self.step_timeout_s:g} s") from None
        except ConnectionClosed as closed:
            lost = self._lose(f"the connection closed {'during' if was_open else 'before'} {kind} ({words_of(closed)})")
            raise ConnectionLost(str(lost), in_request=was_open) from closed
        body = self._body(answer, kind, answer_kind)
        self._lost = None
        return body

    def _body(self, answer: str | bytes, kind: str, answer_kind: str) -> dict[str, Any]:
        try:
            message = json.loads(answer)
        except (ValueError, RecursionError):
            raise self._lose(f"the answer to {kind} is not JSON: {answer[:200]!r}") from None
        body = message.get("data") if isinstance(message, dict) else None
        if not isinstance(body, dict) or message.get("type") not in (answer_kind, "error"):
            raise self._lose(f"the answer to {kind} is not a frame of type {answer_kind!r}: {answer[:200]!r}")
        if message["type"] == "error":
            raise self._error(body)
        return body

    def _error(self, body: dict[str, Any]) -> OpenEnvError:
        code, text = str(body.get("code")), str(body.get("message"))
        if code == "CAPACITY_REACHED":
            self._lose(text)
            limit = body.get("max_sessions")
            return CapacityReached(
                f"{self.url} is full: {body.get('active_sessions')} of {limit} sessions in use",
                limit if isinstance(limit, int) and limit > 0 else None,
            )
        if code == "FACTORY_ERROR":
            return FactoryFailed(str(self._lose(f"{code}: {text}")))
        if code in FATAL_CODES:
            return self._lose(f"{code}: {text}")
        self._lost = None
        return ServerError(code, text, body.get("errors") or [])

    async def _old_session(self, refused: Exception) -> OldHttpSession | None:
        """Return a session over plain HTTP if the WebSocket was refused by a server from before 2026, else None."""
        if not isinstance(refused, InvalidStatus) or refused.response.status_code not in WS_REFUSED:
            return None
        if socket_path(self.url) is not None:  # servers from then listen on ports only
            return None
        address = http_url(self.url)
        if not await speaks_old_http(address, self.connect_timeout_s):
            return None
        return OldHttpSession(address, self.step_timeout_s + 1.0)  # the deadline of `_request` comes first

    def _lose(self, reason: str) -> SessionLost:
        """Make the session unusable and drop the connection at once, so that the server can free the slot."""
        self._lost = reason
        if self._socket is not None:
            _drop(self._socket)
        return SessionLost(f"the session with {self.url} is lost: {reason}")


async def open_session(
    url: str, reset_kwargs: dict[str, Any], *, deadline_s: float = 60.0, step_timeout_s: float = 30.0
) -> tuple[OpenEnvClient, StepResult]:
    """Connect and reset; while the server is full, try again after growing pauses, up to the deadline."""
    end, pause = time.monotonic() + deadline_s, 0.05
    while True:
        client = OpenEnvClient(url, step_timeout_s=step_timeout_s)
        try:
            await client.connect()
            return client, await client.reset(**reset_kwargs)
        except CapacityReached as full:
            await client.close()
            if time.monotonic() + pause > end:
                waited = f", and no slot came free within {deadline_s:g} s" if deadline_s else ""
                raise CapacityReached(f"{full}{waited}", full.max_sessions) from full
        except BaseException:
            await client.close()
            raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)


def _opening(url: str, timeout_s: float) -> connect:
    options: dict[str, Any] = {
        "open_timeout": timeout_s,
        "close_timeout": 2.0,
        "ping_interval": None,  # a busy event loop must not cost the session; every request has a deadline anyway
        "max_size": MAX_FRAME_BYTES,
        "compression": None,
    }
    path = socket_path(url)
    if path is not None:
        return unix_connect(path, "ws://localhost/ws", proxy=None, **options)
    return connect(websocket_url(url), proxy=None if urlsplit(url).hostname in LOOPBACK_HOSTS else True, **options)


def _drop(socket: ClientConnection | OldHttpSession) -> None:
    if isinstance(socket, OldHttpSession):
        socket.abort()
    else:
        socket.transport.abort()


async def _exchange(socket: ClientConnection | OldHttpSession, frame: str) -> str | bytes:
    try:
        await socket.send(frame)
    except ConnectionClosed:
        return await socket.recv()  # a full server sends CAPACITY_REACHED and closes: that frame can still be read
    return await socket.recv()


def _step_result(body: dict[str, Any], lose: Any, *, is_paid: bool = True) -> StepResult:
    """Return the result in an observation frame; raise the error of `lose` if a type in it is wrong.

    is_paid: an unusable reward (NaN, huge) is an error, as after a step; else it becomes None, as after reset.
    """
    observation, reward, done = body.get("observation"), body.get("reward"), body.get("done", False)
    if not isinstance(observation, dict) or not isinstance(done, bool) or not isinstance(reward, int | float | None):
        raise lose(f"an observation frame with a wrong type in it: {str(body)[:200]}")
    try:
        paid = None if reward is None else checked_reward(reward)
    except WrongAnswer as wrong:
        if is_paid:
            raise lose(str(wrong)) from None
        paid = None
    metadata = body.get("metadata") or observation.get("metadata") or {}
    return StepResult(
        observation=observation,
        reward=paid,
        done=done,
        metadata=metadata if isinstance(metadata, dict) else {"metadata": metadata},
    )
