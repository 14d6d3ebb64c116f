"""A TCP proxy that injects the faults of a network and of a broken server into real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

FULL = b'{"type":"error","data":{"message":"full","code":"CAPACITY_REACHED","active_sessions":1,"max_sessions":1}}'
FAULTS = ("garbage", "not json", "wrong frame", "refuse", "cut", "stall", "slow")


class Proxy:
    """The proxy of one server. `fault`, one of FAULTS, changes all data from now on; None passes it unchanged."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self.fault: str | None = None
        self.url = ""
        self.num_connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.num_connections += 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            server_reader, server_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on(reader, server_writer, from_server=False))
                    both.create_task(self._pass_on(server_reader, writer, from_server=True))
            except* OSError:
                pass
            finally:
                server_writer.close()
                writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_server: bool) -> None:
        is_session = False  # after the handshake: plain HTTP is never changed
        while data := await reader.read(2**16):
            writer.write(await self._with_fault(data) if is_session else data)
            await writer.drain()
            is_session |= from_server and data.startswith(b"HTTP/1.1 101")
        writer.close()

    async def _with_fault(self, data: bytes) -> bytes:
        match self.fault:
            case "garbage":
                return b"\xff\x00 no frame at all"
            case "not json":
                return frame(b"<html>502 Bad Gateway</html>")
            case "wrong frame":
                return frame(b'{"type":"observation","data":{"observation":[],"reward":"1e9","done":"yes"}}')
            case "refuse":
                return frame(FULL)
            case "cut":
                raise ConnectionResetError
            case "stall":
                await asyncio.sleep(3600)
            case "slow":
                await asyncio.sleep(0.1)
        return data


def frame(text: bytes) -> bytes:
    """Return an unmasked WebSocket text frame (RFC 6455 section 5.2)."""
    head = bytes([0x81, len(text)]) if len(text) < 126 else bytes([0x81, 126]) + len(text).to_bytes(2, "big")
    return head + text


@asynccontextmanager
async def proxy_to(url: str) -> AsyncGenerator[Proxy]:
    proxy = Proxy(url)
    server = await proxy.serve()
    try:
        yield proxy
    finally:
        server.close()
        proxy.stop()
