"""A port for a server that must be told one. Tests of servers that choose for themselves give them port 0."""

from __future__ import annotations

import os
import socket


def taken_port() -> socket.socket:
    """Listen on a port that the system gives to nobody who asks for any: it is still free when this is closed."""
    for port in range(20_000 + os.getpid() % 500 * 20, 32_000):  # tests in two processes begin far apart
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
    raise AssertionError("no port is free")
