"""A page in the user's browser does not reach a server of ours."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import requests
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from integrations.openenv.servers.callers import for_local_callers


async def answer(bound_host: str | None, *headers: tuple[str, str], allowed: tuple[str, ...] = ()) -> int:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    await for_local_callers(app, bound_host, allowed)({"type": "http", "headers": raw}, None, send)
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("bound_host", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "localhost:8000", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "evil.example:8000", 403),
        ("127.0.0.1", "localhost.evil.example", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "server", 403),
        ("127.0.0.1", "", 403),
        ("127.0.0.1", "[::1", 403),
        ("127.0.0.1", "evil.example@127.0.0.1", 200),
        ("0.0.0.0", "192.168.1.5:8000", 200),
        ("0.0.0.0", "coding-server:8000", 200),
        ("0.0.0.0", "evil.example", 403),
        ("my.machine", "my.machine:80", 200),
        (None, "anything", 200),
    ],
)
async def test_a_server_answers_to_its_own_names(bound_host: str | None, host: str, status: int) -> None:
    assert await answer(bound_host, ("host", host)) == status


async def test_a_name_may_be_allowed_and_one_host_must_be_given() -> None:
    assert await answer("0.0.0.0", ("host", "env.svc.local:80"), allowed=("env.svc.local",)) == 200
    assert await answer("127.0.0.1") == 403
    assert await answer("127.0.0.1", ("host", "127.0.0.1"), ("host", "evil.example")) == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:8001", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("bound_host", ["127.0.0.1", None])
async def test_only_its_own_pages_may_use_it(bound_host: str | None, origin: str, status: int) -> None:
    assert await answer(bound_host, ("host", "127.0.0.1:8000"), ("origin", origin)) == status


async def test_a_running_server_refuses_both(echo_url: str) -> None:
    for headers, status in (({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403)):
        answered = await asyncio.to_thread(requests.post, f"{echo_url}/reset", headers=headers, json={}, timeout=120)
        assert answered.status_code == status
    socket_url = echo_url.replace("http://", "ws://") + "/ws"
    async with connect(socket_url):
        pass
    with pytest.raises(InvalidStatus, match="403"):
        async with connect(socket_url, origin="http://evil.example"):  # ty: ignore[invalid-argument-type]
            pass
