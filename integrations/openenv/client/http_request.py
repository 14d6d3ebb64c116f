"""A single HTTP request, without a proxy if the server is on this machine."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import urlsplit

LOOPBACK_HOSTS = {"127.0.0.1", "localhost", "::1"}


def http_request(address: str, body: bytes | None = None, *, timeout_s: float) -> tuple[int, bytes]:
    """Return status and content of a GET, or of a POST if there is a JSON body. OSError: no answer. Blocks."""
    handlers = [urllib.request.ProxyHandler({})] if urlsplit(address).hostname in LOOPBACK_HOSTS else []
    request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read()
