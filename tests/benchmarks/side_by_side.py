"""Two or more ways of doing the same work, timed in turn: each in a process of its own, medians, ratios, one JSON line.

A worker is a module of tests/benchmarks/workers. It prepares, prints {"ready": ...}, and then does the work once for
every line it reads, printing {"seconds": ..., ...} each time. So nothing but the work is timed, and whatever else the
machine does hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class WorkerFailed(RuntimeError):
    """A worker ended, or said something that is no JSON."""


class Worker:
    """One process that does the work when asked."""

    def __init__(self, name: str, command: Sequence[str], settings: dict[str, Any]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the worker)
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )

    def read(self) -> dict[str, Any]:
        """The next line that is a JSON object; whatever else a library prints is passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        words = self._errors.read()[-2000:].decode(errors="replace")
        raise WorkerFailed(f"{self.name} ended with code {self._process.wait()}:\n{words}")

    def work(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(settings_to_work: Callable[[dict[str, Any]], Callable[[], dict[str, Any]]]) -> None:
    """A worker's main function: prepare from the settings, then work once per line."""
    work = settings_to_work(json.loads(sys.argv[1]))
    work()  # once to warm up
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        facts = work()
        print(json.dumps({"seconds": time.perf_counter() - start, **facts}), flush=True)


def timed_in_turn(workers: Sequence[Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every worker once per round, in turn; `rounds` results each."""
    results: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    try:
        for worker in workers:
            worker.read()
        for index in range(rounds):
            for worker in workers:
                results[worker.name].append(worker.work())
            print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    return results


def project(module: str, with_packages: Sequence[str] = ()) -> list[str]:
    """The command of a worker in this project's environment, with more packages on top."""
    if not with_packages:
        return [sys.executable, "-m", f"tests.benchmarks.workers.{module}"]
    more = [word for package in with_packages for word in ("--with", package)]
    return ["uv", "run", "--frozen", *more, "python", "-m", f"tests.benchmarks.workers.{module}"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One benchmark's outcome: medians of a rate (more is better), and the most this machine could do."""

    what: str
    unit: str
    ours: float
    peers: dict[str, float]
    ceiling: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "peers": self.peers,
            "ratio": {name: self.ours / rate for name, rate in self.peers.items()},
            "ceiling": self.ceiling,
            "share_of_ceiling": self.ours / self.ceiling,
            "machine": machine(),
        }

    def print(self, as_json: bool) -> None:
        """A table for people, unless they want JSON only; JSON in the last line always."""
        if not as_json:
            print(f"{self.what} [{self.unit}], on {machine()}")
            print(f"  {'ours':<14}{self.ours:>10.1f}   {100 * self.ours / self.ceiling:.0f}% of the ceiling")
            for name, rate in self.peers.items():
                print(f"  {name:<14}{rate:>10.1f}   ours is {self.ours / rate:.2f} times that")
            print(f"  {'ceiling':<14}{self.ceiling:>10.1f}")
        print(json.dumps(self.as_dict()))


def median_of(results: Sequence[dict[str, Any]], rate: Callable[[dict[str, Any]], float]) -> float:
    return median(rate(result) for result in results)


def machine() -> str:
    """Processor, cores, and what torch makes of them."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{model}{amx}, {os.cpu_count()} cores, torch {torch.__version__}"


def arguments(description: str, **defaults: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=5, help="results per worker; the median counts")
    parser.add_argument("--model", default="auto", help="folder, hub name, or auto")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser
