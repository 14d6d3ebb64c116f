"""Timing of two or more programs that do the same work, in turn, each in its own process.

A worker is a module of tests/benchmarks/workers. It prepares, prints {"ready": ...}, and then does the work once for
every line it reads, printing {"seconds": ..., ...} each time. So nothing but the work is timed, and whatever else the
machine does hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRL = "trl==1.16.0"


class WorkerFailed(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """One process that does the work once per request. `variables` are added to its environment."""

    def __init__(
        self, name: str, command: Sequence[str], settings: dict[str, Any], variables: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._command = [*command, json.dumps(settings)]
        self._variables = {**os.environ, **QUIET, **_wheels(), **(variables or {})}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the worker)

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=self._variables,
            start_new_session=True,  # a group of its own, with whatever it starts
        )

    def read(self) -> dict[str, Any]:
        """Return the worker's next line that is a JSON object; other output, of libraries, is skipped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                return json.loads(line)
        self._errors.seek(0)
        words = self._errors.read()[-4000:].decode(errors="replace")
        raise WorkerFailed(f"{self.name} ended with code {self._process.wait()}:\n{words}")

    def work(self) -> dict[str, Any]:
        """Run the work once and return its result. The worker is paused before and after."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        os.killpg(self._process.pid, signal.SIGCONT)
        facts = self.read()
        self.pause()
        return facts

    def pause(self) -> None:
        """Stop the process: some workers poll while they wait, which takes a core from the others."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self, patience_s: float = 20.0) -> None:
        """End the worker and all its processes: close its stdin, and kill them if they do not end soon."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGCONT)
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, ending)
                patience_s = 20.0
        self._process.wait()


QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _wheels() -> dict[str, str]:
    """Return variables that let uv use pip's folder of wheels, which may hold a CPU build of PyTorch."""
    folder = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    return {"UV_FIND_LINKS": folder} if folder else {}


def timed_in_turn(
    workers: Sequence[Worker], rounds: int, after_round: Callable[[], None] = lambda: None
) -> dict[str, list[dict[str, Any]]]:
    """Run every worker once per round, in turn. Returns `rounds` results of each."""
    results: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    with ExitStack() as closing:
        for worker in workers:  # one after the other: together they would not only share the cores, but fight for them
            worker.start()
            closing.callback(worker.close)
            worker.read()
            worker.pause()
        for index in range(rounds):
            for worker in workers:
                results[worker.name].append(worker.work())
            after_round()
            print(f"round {index + 1} of {rounds}: {_seconds(results)}", file=sys.stderr, flush=True)
    return results


def _seconds(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return each worker's seconds and busy cores in the last round; few cores mean that other programs ran too."""
    return ", ".join(
        f"{name} {rows[-1]['seconds']:.2f} s on {rows[-1].get('cores', 0):.1f} cores" for name, rows in results.items()
    )


def project(module: str, with_packages: Sequence[str] = ()) -> list[str]:
    """Return the command of a worker in this project's environment, with these packages added."""
    if not with_packages:
        return [sys.executable, "-m", f"tests.benchmarks.workers.{module}"]
    more = [word for package in with_packages for word in ("--with", package)]
    return ["uv", "run", "--frozen", *more, "python", "-m", f"tests.benchmarks.workers.{module}"]


def arguments(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark. Also makes SIGTERM end the workers first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--rounds", type=at_least_one, default=5, help="results per side; the median counts; default: 5"
    )
    parser.add_argument("--model", default="auto", help="folder, hub name, or auto")
    parser.add_argument("--no-peers", action="store_true", help="time ours alone")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least_one, default=value, help=f"default: {value}")
    return parser


def at_least_one(text: str) -> int:
    """Return the whole number that an argument must be."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def add_trl_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two settings that decide how fast TRL is.

    The defaults were the fastest tried on two cores with AMX: an update of 32 samples took 11 s, and 27 s in one pass.
    """
    parser.add_argument("--trl-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of TRL's weights")
    parser.add_argument("--trl-rows", type=int, default=8, help="samples in one pass of TRL")


def trl_settings(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": chosen.trl_dtype, "rows": chosen.trl_rows}
