"""Adapter for servers from before 2026 (openenv-core 0.1): plain HTTP behind the interface of a WebSocket session.

    {"type": "reset", "data": {}}          POST /reset {}
    {"type": "step", "data": {fields}}     POST /step {"action": {fields}}
    {"type": "state"}                      GET /state
    {"type": "error", ...}                 422, 500 and the like

Such a server has one environment, shared by every client. So this process opens one session on it, and answers a second
that the server is full. A change of the episode's id shows that another process plays too.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from integrations.openenv.client.http_request import http_request

WS_REFUSED = (403, 404)  # HTTP status of such a server for a WebSocket request

_taken: set[str] = set()  # addresses of old servers on which this process has a session


async def speaks_old_http(address: str, timeout_s: float) -> bool:
    """Return whether a server that refused /ws is an old one: it is healthy, but has no /schema as newer ones have."""

    def is_old() -> bool:
        if http_request(f"{address}/schema", timeout_s=timeout_s)[0] != 404:
            return False
        return http_request(f"{address}/health", timeout_s=timeout_s)[0] == 200

    try:
        return await asyncio.to_thread(is_old)
    except (OSError, HTTPException):
        return False


class OldHttpSession:
    """The part of a WebSocket connection that the client uses: `send` a frame, `recv` the answer's frame, `close`."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._frame: dict[str, Any] = {}
        self._episode_id: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="openenv-http")
        self._under_way: Future[str] | None = None
        self._has_slot = address not in _taken
        _taken.add(address)

    async def send(self, frame: str) -> None:
        self._frame = json.loads(frame)

    async def recv(self) -> str:
        if not self._has_slot:
            full = "a server from before 2026 has one environment for all, and a session of ours plays in it"
            return _error("CAPACITY_REACHED", full, active_sessions=1, max_sessions=1)
        self._under_way = self._thread.submit(self._answer, self._frame)
        return await asyncio.wrap_future(self._under_way)

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Free the slot once the server has answered: a late step would otherwise fall into the next episode."""
        self._thread.shutdown(wait=False)
        has_slot, self._has_slot = self._has_slot, False
        if not has_slot:
            return
        if self._under_way is None:
            _taken.discard(self._address)
        else:
            self._under_way.add_done_callback(lambda _: _taken.discard(self._address))

    def _answer(self, frame: dict[str, Any]) -> str:
        try:
            if frame["type"] == "reset":
                answer = self._request("/reset", "observation", frame["data"])
                self._episode_id = self._current_episode_id()
            elif frame["type"] == "step":
                answer = self._request("/step", "observation", {"action": _fields(frame["data"])})
                if self._current_episode_id() != self._episode_id:
                    return _error("SESSION_ERROR", "somebody else has reset this server's only environment")
            else:
                answer = self._request("/state", "state", None)
        except (OSError, HTTPException) as failed:
            return _error("SESSION_ERROR", f"{type(failed).__name__}: {failed}")
        return answer

    def _request(self, path: str, kind: str, body: dict[str, Any] | None) -> str:
        sent = None if body is None else json.dumps(body).encode()
        status, content = http_request(self._address + path, sent, timeout_s=self._timeout_s)
        text = content.decode(errors="replace")
        if status == 200:
            return f'{{"type": "{kind}", "data": {text}}}'
        if status == 422:
            return _error("VALIDATION_ERROR", text[:500], errors=_complaints(text))
        code = "EXECUTION_ERROR" if status >= 500 else "SESSION_ERROR"
        return _error(code, f"HTTP {status} to {path}: {text[:500]}")

    def _current_episode_id(self) -> Any:
        status, content = http_request(f"{self._address}/state", timeout_s=self._timeout_s)
        try:
            return json.loads(content).get("episode_id") if status == 200 else None
        except (ValueError, AttributeError):
            return None


def _fields(action: dict[str, Any]) -> dict[str, Any]:
    """Return the action's fields as old servers take them: today's tool arguments (echo_env's `message`)."""
    if action.get("type") == "call_tool" and isinstance(action.get("arguments"), dict):
        return action["arguments"]
    return action


def _complaints(text: str) -> list[Any]:
    """Return pydantic's list of errors out of FastAPI's {"detail": [...]}; [] if the text holds none."""
    try:
        detail = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return []
    return detail if isinstance(detail, list) else []


def _error(code: str, message: str, **more: Any) -> str:
    return json.dumps({"type": "error", "data": {"code": code, "message": message, **more}})
