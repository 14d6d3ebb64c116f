"""Addresses of servers that listen on a file instead of a port: unix:/folder/server.sock. They need no network."""

from __future__ import annotations

import http.client
import socket

SCHEME = "unix:"


def socket_path(url: str) -> str | None:
    """Return the file of a unix address: unix:/folder/server.sock -> /folder/server.sock; None for any other."""
    return url.removeprefix(SCHEME) if url.startswith(SCHEME) else None


def get_over_socket(path: str, target: str, timeout_s: float) -> bytes:
    """Return the body of GET `target`; OSError if the status is not 200."""
    connection = _UnixConnection(path, timeout_s)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"HTTP {response.status}")
        return response.read()
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
