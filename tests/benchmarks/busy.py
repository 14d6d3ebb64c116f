"""Benchmark of the slow-down of a GRPO step beside other work, compared with a fair share of the CPU cores.

uv run python -m tests.benchmarks.busy --json [--spinning 1 2 4] [--also GOMP_SPINCOUNT=0]

`share_of_fair`, for each number n of processes that spin: the quiet step's seconds over the busy step's, divided by
cores / (cores + n). 1 is a step that slows down only as its share of the cores does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.comparison import Comparison
from tests.benchmarks.side_by_side import Worker, arguments, project
from tests.benchmarks.update import settings_of

Seconds = dict[int, list[float]]  # of the steps, by the number of spinning processes beside them


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=64, prompt_tokens=50, token_budget=4096)
    parser.add_argument("--spinning", type=int, nargs="+", default=[1, 2, 4], help="processes that spin beside it")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=VALUE", help="time it with this set, too")
    chosen = parser.parse_args()
    model = resolve_model(chosen.model)
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for number, variable in enumerate(["", *chosen.also]):
            own = Path(folder) / str(number)
            own.mkdir()
            variables = dict(setting.split("=", 1) for setting in variable.split(",") if setting)
            workers.append(Worker(variable or "ours", project("ours_step"), settings_of(chosen, model, own), variables))
        seconds = timed(workers, chosen.rounds, chosen.spinning)
    shares = {name: shares_of_fair(of, len(os.sched_getaffinity(0))) for name, of in seconds.items()}
    Comparison(
        what=f"GRPO step beside spinning processes, {chosen.num_prompts} x {chosen.samples} x {chosen.tokens} tokens",
        unit="s, quiet",
        ours=median(seconds["ours"][0]),
        peers={name: median(of[0]) for name, of in seconds.items() if name != "ours"},
        is_time=True,
        facts={
            "share_of_fair": shares["ours"],
            "seconds": {name: {n: median(values) for n, values in of.items()} for name, of in seconds.items()},
            "shares": shares,
            "load": os.getloadavg(),
        },
    ).print(chosen.json)


def shares_of_fair(seconds: Mapping[int, list[float]], cores: int) -> dict[int, float]:
    """Return, for each number of spinning processes, the quiet median over the busy one, divided by the fair share."""
    quiet = median(seconds[0])
    return {n: round(quiet / median(busy) / (cores / (cores + n)), 3) for n, busy in seconds.items() if n}


def timed(workers: list[Worker], rounds: int, spinning: list[int]) -> dict[str, Seconds]:
    """Time every worker in turn, alone and then beside each number of spinning processes, `rounds` times."""
    results: dict[str, Seconds] = {worker.name: {n: [] for n in [0, *spinning]} for worker in workers}
    with ExitStack() as closing:
        for worker in workers:
            worker.start()
            closing.callback(worker.close)
            worker.read()
            worker.pause()
        for index in range(rounds):
            for n in [0, *spinning]:
                with spinners(n):
                    for worker in workers:
                        results[worker.name][n].append(worker.work()["seconds"])
            last = {name: {n: round(of[n][-1], 2) for n in of} for name, of in results.items()}
            print(f"round {index + 1} of {rounds}: {last}", file=sys.stderr, flush=True)
    return results


@contextmanager
def spinners(number: int) -> Generator[None]:
    """Run this many processes that each keep one core busy, until the block ends."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
