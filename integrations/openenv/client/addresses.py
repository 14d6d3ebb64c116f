"""HTTP and WebSocket forms of a server's address, and GET requests to it."""

from __future__ import annotations

import asyncio
import json
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from integrations.openenv.client.errors import OpenEnvError, OutOfDescriptors, connection_error, words_of
from integrations.openenv.client.http_request import http_request
from integrations.openenv.client.unix_socket import get_over_socket, socket_path


async def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    """Return whether GET /health answers "healthy" in time, which says nothing about free slots.

    OutOfDescriptors: this process has no file descriptor left for the request.
    """
    try:
        return (await fetch_json(url, "/health", timeout_s)).get("status") == "healthy"
    except OutOfDescriptors:
        raise
    except OpenEnvError:
        return False


async def schema(url: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """Return the answer of GET /schema: the JSON schemas of `action`, `observation` and `state`."""
    return await fetch_json(url, "/schema", timeout_s)


async def fetch_json(url: str, path: str, timeout_s: float) -> dict[str, Any]:
    """Return the JSON object that GET `path` answers, requested in a thread.

    OutOfDescriptors or ConnectionLost if the server cannot be reached; OpenEnvError for any other answer.
    """
    socket = socket_path(url)
    address = f"{url} {path}" if socket is not None else http_url(url) + path

    def get() -> bytes:
        if socket is not None:
            return get_over_socket(socket, path, timeout_s)
        status, content = http_request(address, timeout_s=timeout_s)
        if status != 200:
            raise OSError(f"HTTP {status}")
        return content

    try:
        body = json.loads(await asyncio.to_thread(get))
    except OSError as failed:
        raise connection_error(failed, f"GET {address} failed: {words_of(failed)}") from failed
    except (ValueError, HTTPException) as failed:
        raise OpenEnvError(f"GET {address} failed: {words_of(failed)}") from failed
    if not isinstance(body, dict):
        raise OpenEnvError(f"GET {address} gave {body!r}, not a JSON object")
    return body


def websocket_url(url: str) -> str:
    """Return the WebSocket address of a server: http://host:8000 -> ws://host:8000/ws."""
    address = http_url(url)
    scheme, rest = address.split("://", 1)
    return f"{'wss' if scheme == 'https' else 'ws'}://{rest}/ws"


def http_url(url: str) -> str:
    """Return the HTTP address of a server: ws://host:8000/ws -> http://host:8000."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # both are parsed now
    except ValueError as wrong:  # brackets without an IPv6 address, a port that is no number
        raise OpenEnvError(f"url={url!r} must look like http://host:8000: {wrong}") from None
    scheme = {"http": "http", "https": "https", "ws": "http", "wss": "https"}.get(parts.scheme)
    if scheme is None or not host or not host.isprintable() or " " in host:
        raise OpenEnvError(f"url={url!r} must look like http://host:8000")
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/ws')}"
