"""Check of the Host and Origin headers, so that no web page of another site can use a local server.

A page in the user's browser can reach every port of this machine. Its requests carry its Origin; if it made its own
name point here (DNS rebinding), their Host is that name. The protocol has no password, so both headers are checked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

App = Callable[[Any, Any, Any], Awaitable[None]]


def for_local_callers(app: App, bound_host: str | None, allowed: Collection[str] = ()) -> App:
    """Return the app behind a check of Host and Origin.

    bound_host: the address that the server listens on; None for a socket file. allowed: further names of this machine.
    """
    names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in allowed)}
    if bound_host:
        names.add(bound_host.lower())

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        complaint = _complaint(scope, bound_host, names) if scope["type"] in ("http", "websocket") else ""
        if not complaint:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": complaint[:120]})
        else:
            body = complaint.encode(errors="replace")
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    return checked


def _complaint(scope: Any, bound_host: str | None, names: Collection[str]) -> str:
    hosts, origins = (_values(scope, name) for name in (b"host", b"origin"))
    if bound_host is not None and not (len(hosts) == 1 and _is_ours(hosts[0], bound_host, names)):
        return f"this server is not called {', '.join(hosts)!r}; --allow-host NAME of the server allows a name"
    if any(urlsplit(origin).netloc not in hosts for origin in origins):
        return f"a page of {', '.join(origins)!r} may not use this server"
    return ""


def _values(scope: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key.lower() == name]


def _is_ours(host: str, bound_host: str, names: Collection[str]) -> bool:
    """Return whether a Host header names this server.

    An IP address always does, because a page cannot be named by one. Unless the server listens on loopback only, names
    without a dot do too: they belong to the local network.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names or (not _is_loopback(bound_host) and "." not in name and bool(name))
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
