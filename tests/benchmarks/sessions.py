"""Many episodes at once on one echo server: our pool beside a bare `websockets` loop, and beside a container per episode.

    python -m tests.benchmarks.sessions [--sessions 256] [--seconds 3] [--rounds 5] [--image TAG]

Both play the same: sessions are opened, then each steps as fast as the server answers until the time is up. Rounds
alternate, the medians count, and the ratio is taken round by round, so that a slow moment of the machine hits both.
With an image: short episodes (reset, one step) one after the other, in a container each, and on a pooled container.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from loguru import logger
from websockets.asyncio.client import ClientConnection, connect

from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.client import websocket_url
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.containers import Container
from integrations.openenv.pool import Lease, ServerPool
from integrations.openenv.server_process import ServerProcess
from integrations.openenv.source import ServerSource

HELLO = EchoEntry().parse("red lamp tree")
FRAME = json.dumps({"type": "step", "data": HELLO})
NUM_CONTAINER_EPISODES = 3  # per round, of a container each
NUM_POOLED_EPISODES = 200

Step = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one side."""

    open_s: float  # until all sessions were open and reset
    steps_per_s: float
    p50_ms: float
    p99_ms: float
    failures: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Sessions at once on one echo server.")
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0, help="of stepping, per round and side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", help="an image of our echo server: compares with a container per episode, too")
    arguments = parser.parse_args()
    logger.remove()
    asyncio.run(benchmark(arguments.sessions, arguments.seconds, arguments.rounds, arguments.image))


async def benchmark(num_sessions: int, seconds: float, num_rounds: int, image: str | None) -> None:
    server = await ServerProcess.start(EchoEntry.server_module, max_sessions=num_sessions, timeout_s=120)
    try:
        pairs = []
        for _ in range(num_rounds):
            pairs.append((await bare(server.url, num_sessions, seconds), await ours(server.url, num_sessions, seconds)))
    finally:
        server.stop()
    columns = ("open_s", "steps_per_s", "p50_ms", "p99_ms", "failures")
    result: dict[str, Any] = {"sessions": num_sessions}
    print(f"{num_sessions} sessions at once, medians of {num_rounds}\n{'':8}" + "".join(f"{c:>14}" for c in columns))
    for index, side in enumerate(("bare", "ours")):
        result[side] = {c: round(median(getattr(pair[index], c) for pair in pairs), 3) for c in columns}
        print(f"{side:8}" + "".join(f"{result[side][c]:14.2f}" for c in columns))
    result["failures"] = sum(run.failures for pair in pairs for run in pair)
    result["ratio"] = round(median(b.steps_per_s / a.steps_per_s for a, b in pairs), 3)
    print(f"ours / bare: {result['ratio']:.3f}")
    if image is not None:
        result |= await containers(image, num_rounds)
    print(json.dumps(result))


async def bare(url: str, num_sessions: int, seconds: float) -> Run:
    """As little as the protocol needs: a frame out, a frame in."""
    start = time.monotonic()
    opening = asyncio.Semaphore(32)

    async def opened() -> ClientConnection:
        async with opening:
            socket = await connect(
                websocket_url(url), ping_interval=None, compression=None, proxy=None, open_timeout=60, max_size=None
            )
            await socket.send('{"type": "reset", "data": {}}')
            await socket.recv()
            return socket

    def stepping(socket: ClientConnection) -> Step:
        async def step() -> None:
            await socket.send(FRAME)
            json.loads(await socket.recv())

        return step

    sockets = await asyncio.gather(*(opened() for _ in range(num_sessions)))
    open_s = time.monotonic() - start
    try:
        return await timed([stepping(socket) for socket in sockets], seconds, open_s)
    finally:
        await asyncio.gather(*(socket.close() for socket in sockets))


async def ours(url: str, num_sessions: int, seconds: float) -> Run:
    """Leases of a pool."""
    pool = ServerPool(OpenEnvConfig(url=url, max_sessions=num_sessions))
    source = ServerSource("echo_env", url=url)
    start = time.monotonic()
    leases = await asyncio.gather(*(pool.lease(source) for _ in range(num_sessions)))
    open_s = time.monotonic() - start

    def stepping(lease: Lease) -> Step:
        async def step() -> None:
            await lease.step(HELLO)

        return step

    try:
        return await timed([stepping(lease) for lease in leases], seconds, open_s)
    finally:
        await asyncio.gather(*(lease.release() for lease in leases))
        await pool.close()


async def timed(steps: list[Step], seconds: float, open_s: float) -> Run:
    """All of them side by side, each as fast as it can, until the time is up. A failure ends its session."""
    latencies: list[float] = []
    start = time.monotonic()
    end = start + seconds

    async def until_the_end(step: Step) -> None:
        while (began := time.monotonic()) < end:
            await step()
            latencies.append(time.monotonic() - began)

    outcomes = await asyncio.gather(*(until_the_end(step) for step in steps), return_exceptions=True)
    wall_s = time.monotonic() - start
    latencies.sort()
    return Run(
        open_s=open_s,
        steps_per_s=len(latencies) / wall_s,
        p50_ms=1000 * latencies[len(latencies) // 2],
        p99_ms=1000 * latencies[int(0.99 * len(latencies))],
        failures=sum(outcome is not None for outcome in outcomes),
    )


async def containers(image: str, num_rounds: int) -> dict[str, Any]:
    """Episodes per second: a container for each, and a pool's container for all."""
    each, pooled = [], []
    pool = ServerPool(OpenEnvConfig(runtime="docker", startup_timeout_s=120))
    source = ServerSource("echo_env", image=image)
    await (await pool.lease(source)).release()  # a run starts its container once
    for _ in range(num_rounds):
        start = time.monotonic()
        for _ in range(NUM_CONTAINER_EPISODES):
            container = await Container.start(image, timeout_s=120, pull=False)
            await episode(ServerPool(OpenEnvConfig(url=container.url)), source)
            await asyncio.to_thread(container.stop)
        each.append(NUM_CONTAINER_EPISODES / (time.monotonic() - start))
        start = time.monotonic()
        for _ in range(NUM_POOLED_EPISODES):
            await episode(pool, source)
        pooled.append(NUM_POOLED_EPISODES / (time.monotonic() - start))
    await pool.close()
    ratio = median(b / a for a, b in zip(each, pooled, strict=True))
    print(f"episodes per second: a container each {median(each):.2f}, pooled {median(pooled):.1f}, ratio {ratio:.0f}")
    return {
        "episodes_per_s_container_each": round(median(each), 3),
        "episodes_per_s_pooled": round(median(pooled), 2),
        "episodes_ratio": round(ratio, 1),
    }


async def episode(pool: ServerPool, source: ServerSource) -> None:
    """Reset, one step, the end."""
    lease = await pool.lease(source)
    await lease.step(HELLO)
    await lease.release()


if __name__ == "__main__":
    main()
