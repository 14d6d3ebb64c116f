"""Servers from before 2026 (openenv-core 0.1): plain HTTP, made to look like a WebSocket session.

    {"type": "reset", "data": {}}          POST /reset {}
    {"type": "step", "data": {fields}}     POST /step {"action": {fields}}
    {"type": "state"}                      GET /state
    {"type": "error", ...}                 422, 500 and the like

Such a server has one environment, and every client plays in it. So it has one slot in this process; a second session
is told that the server is full. Whether another process plays too is seen by the episode's id.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from integrations.openenv.client.http_request import http_request

WS_REFUSED = (403, 404)  # what such a server answers where it is asked for a WebSocket

_taken: set[str] = set()  # addresses of the servers that a session of this process plays on


async def speaks_old_http(address: str, timeout_s: float) -> bool:
    """Asked once /ws is refused: no /schema, but healthy. Newer servers have /schema, and their /step has no memory."""

    def ask() -> bool:
        if http_request(f"{address}/schema", timeout_s=timeout_s)[0] != 404:
            return False
        return http_request(f"{address}/health", timeout_s=timeout_s)[0] == 200

    try:
        return await asyncio.to_thread(ask)
    except (OSError, HTTPException):
        return False


class OldHttpSession:
    """As much of a WebSocket connection as the client uses: `send` a frame, `recv` the answer's frame, `close`."""

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
        """Give the slot back; not before the server has answered, or a late step would fall into the next episode."""
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
                answer = self._ask("/reset", "observation", frame["data"])
                self._episode_id = self._current_episode_id()
            elif frame["type"] == "step":
                answer = self._ask("/step", "observation", {"action": _fields(frame["data"])})
                if self._current_episode_id() != self._episode_id:
                    return _error("SESSION_ERROR", "somebody else has reset this server's only environment")
            else:
                answer = self._ask("/state", "state", None)
        except (OSError, HTTPException) as failed:
            return _error("SESSION_ERROR", f"{type(failed).__name__}: {failed}")
        return answer

    def _ask(self, path: str, kind: str, body: dict[str, Any] | None) -> str:
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
    """There were no tools then: what is a tool's argument now was a field of the action (echo_env's `message`)."""
    if action.get("type") == "call_tool" and isinstance(action.get("arguments"), dict):
        return action["arguments"]
    return action


def _complaints(text: str) -> list[Any]:
    """Pydantic's list, as FastAPI wraps it."""
    try:
        detail = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return []
    return detail if isinstance(detail, list) else []


def _error(code: str, message: str, **more: Any) -> str:
    return json.dumps({"type": "error", "data": {"code": code, "message": message, **more}})
