"""Many episodes at once on one echo server: the pool beside a bare `websockets` loop and a container per episode.

    python -m tests.benchmarks.sessions [--sessions 256] [--seconds 1] [--rounds 5] [--image TAG]

Both play the same: all sessions are opened, then each steps as fast as the server answers until the time is up. Both
sides' sessions stay open and the sides take short turns, each first in every second round, so that a slow moment of
the machine hits both. Medians count; the ratio is taken round by round.
With an image: short episodes (reset, one step) one after the other, in a container each, and on a pooled container.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from loguru import logger
from websockets.asyncio.client import ClientConnection, connect

from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.client.addresses import websocket_url
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting.containers import Container
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.hosting.source import ServerSource
from integrations.openenv.pool.server_pool import ServerPool

HELLO = EchoEntry().parse("red lamp tree")
NUM_CONTAINER_EPISODES = 3  # per round, of a container each
NUM_POOLED_EPISODES = 200

Step = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """The result of one side in one round."""

    steps_per_s: float
    p50_ms: float
    p99_ms: float
    failures: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Sessions at once on one echo server.")
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1.0, help="of stepping, per round and side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", help="an image of our echo server: compares with a container per episode, too")
    arguments = parser.parse_args()
    logger.remove()
    asyncio.run(benchmark(arguments.sessions, arguments.seconds, arguments.rounds, arguments.image))


async def benchmark(num_sessions: int, seconds: float, num_rounds: int, image: str | None) -> None:
    server = await ServerProcess.start(EchoEntry.server_module, max_sessions=2 * num_sessions, timeout_s=120)
    result: dict[str, Any] = {"sessions": num_sessions, "bare": {}, "ours": {}}
    try:
        async with AsyncExitStack() as stack:
            sides = {}
            for name, opened in (("bare", bare_sessions), ("ours", pool_sessions)):
                start = time.monotonic()
                sides[name] = await opened(server.url, num_sessions, stack)
                result[name]["open_s"] = round(time.monotonic() - start, 2)
            runs: dict[str, list[Run]] = {"bare": [], "ours": []}
            for number in range(num_rounds):
                for name in ("bare", "ours") if number % 2 else ("ours", "bare"):
                    runs[name].append(await timed(sides[name], seconds))
    finally:
        server.stop()
    pairs = list(zip(runs["bare"], runs["ours"], strict=True))
    result["ratio"] = round(median(ours.steps_per_s / bare.steps_per_s for bare, ours in pairs), 3)
    columns = ("steps_per_s", "p50_ms", "p99_ms", "failures")
    print(f"{num_sessions} sessions at once, medians of {num_rounds}\n{'':8}{'open_s':>14}", end="")
    print("".join(f"{column:>14}" for column in columns))
    for name, of_side in runs.items():
        result[name] |= {column: round(median(getattr(run, column) for run in of_side), 2) for column in columns}
        print(f"{name:8}" + "".join(f"{value:14.2f}" for value in result[name].values()))
    print(f"ours / bare: {result['ratio']:.3f}")
    result["failures"] = sum(run.failures for pair in pairs for run in pair)
    if image is not None:
        result |= await containers(image, num_rounds)
    print(json.dumps(result))


async def bare_sessions(url: str, num_sessions: int, stack: AsyncExitStack) -> list[Step]:
    """Open sessions with `websockets` alone; a step sends one frame and reads one."""
    opening = asyncio.Semaphore(32)

    async def opened() -> ClientConnection:
        async with opening:
            socket = await connect(
                websocket_url(url), ping_interval=None, compression=None, proxy=None, open_timeout=60, max_size=None
            )
            stack.push_async_callback(socket.close)
            await socket.send('{"type": "reset", "data": {}}')
            await socket.recv()
            return socket

    async def step(socket: ClientConnection) -> None:
        await socket.send(json.dumps({"type": "step", "data": HELLO}))
        json.loads(await socket.recv())

    return [partial(step, socket) for socket in await asyncio.gather(*(opened() for _ in range(num_sessions)))]


async def pool_sessions(url: str, num_sessions: int, stack: AsyncExitStack) -> list[Step]:
    """Open sessions as leases of a pool."""
    pool = ServerPool(OpenEnvConfig(url=url, max_sessions=num_sessions))
    stack.push_async_callback(pool.close)
    source = ServerSource("echo_env", url=url)
    leases = await asyncio.gather(*(pool.lease(source) for _ in range(num_sessions)))
    for lease in leases:
        stack.push_async_callback(lease.release)
    return [partial(lease.step, HELLO) for lease in leases]


async def timed(steps: list[Step], seconds: float) -> Run:
    """Step all sessions concurrently, as fast as possible, until the time is up. A failure ends its session."""
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
        steps_per_s=len(latencies) / wall_s,
        p50_ms=1000 * latencies[len(latencies) // 2],
        p99_ms=1000 * latencies[int(0.99 * len(latencies))],
        failures=sum(outcome is not None for outcome in outcomes),
    )


async def containers(image: str, num_rounds: int) -> dict[str, Any]:
    """Return episodes per second with a container for each, and with a pool's container for all."""
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
    """Play one episode of a pool: reset, one step, release."""
    lease = await pool.lease(source)
    await lease.step(HELLO)
    await lease.release()


if __name__ == "__main__":
    main()
