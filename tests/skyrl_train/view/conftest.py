"""Runs made by the trainer's own writers, with the worst that models, servers and folders can say, and their server."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uvicorn

from skyrl_train.batch.packing import pack
from skyrl_train.batch.samples import to_samples
from skyrl_train.run.metrics import MetricsLog, eval_metrics, rollout_metrics
from skyrl_train.run.records.run_info import RunInfo, write_run_info
from skyrl_train.run.records.trajectories import TrajectoryStore
from skyrl_train.types import EpisodeEnd, Trajectory
from skyrl_train.view.app import make_app
from skyrl_train.view.command import _listener
from skyrl_train.view.library import Library
from tests.skyrl_train.run.records.episodes import TOKENIZER, group, prompt, trajectory

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\x00\x1b[31m\u202e\"'></style>{{7*7}}"
EVIL_NAME = "<img src=x onerror=alert(3)>"
NUM_STEPS, NUM_PROMPTS, NUM_SAMPLES = 4, 3, 3


def played(step: int) -> list[Trajectory]:
    """Return the episodes of a training step; rewards grow with the step and differ within a group."""
    return [
        trajectory(
            [f"try {step} {'abc'[repetition]}{EVIL if repetition == 2 else ''}", f"word{number} yes 第一步"],
            [0.0, step + repetition - 2.0],
            of=prompt(EVIL if number == 2 else f"task{number}"),
            repetition=repetition,
            end=EpisodeEnd.OUT_OF_TOKENS if repetition == 1 else EpisodeEnd.FINISHED,
            observation=EVIL,
            env_metrics={EVIL: EVIL},
            seconds=0.5 * step,
        )
        for number in range(NUM_PROMPTS)
        for repetition in range(NUM_SAMPLES)
    ]


def evaluated(step: int) -> list[Trajectory]:
    return [trajectory([f"answer {step}"], [0.25 * step * number], of=prompt(f"held{number}")) for number in range(3)]


def write_step(folder: Path, step: int, store: TrajectoryStore, log: MetricsLog) -> None:
    """Write a step as the trainer does, advantages included."""
    episodes = played(step)
    store.add("train", step, episodes)
    samples = to_samples(episodes)
    batch = pack(samples)
    store.add_advantages(step, samples, replace(batch, advantages=torch.arange(batch.num_tokens) / batch.num_tokens))
    groups = [group(*episodes[i : i + NUM_SAMPLES]) for i in range(0, len(episodes), NUM_SAMPLES)]
    log.log(step, rollout_metrics(groups) | odd_metrics(step) | {"policy/grad_norm": 1.0 / step})


def odd_metrics(step: int) -> dict[str, float]:
    """Return numbers that a chart may not choke on: huge, tiny, equal but for rounding, not finite."""
    return {
        f"environment/{EVIL}": 1.0 * step,
        "odd/huge": 1e300 * (-1) ** step,
        "odd/tiny": 1e-320 * step,
        "odd/noise": 1 / 3 + (step % 2) * 6e-17,
        "odd/nan": float("nan"),
        "odd/infinite": float("inf") if step % 2 else -1.0,
    }


def write_run(folder: Path, *, num_steps: int = NUM_STEPS, lr: object = 1e-6) -> Path:
    """Write a run with an evaluation before training and after each two steps."""
    store, log = TrajectoryStore(folder, TOKENIZER), MetricsLog(folder)
    for step in range(num_steps + 1):
        if step:
            write_step(folder, step, store, log)
        if step % 2 == 0:
            store.add("eval", step, evaluated(step))
            log.log(step, eval_metrics([group(one) for one in evaluated(step)]))
    store.close()
    log.close()
    changed = {"trainer.policy.optimizer_config.lr": [lr, 2e-6], EVIL_NAME: [EVIL, None]}
    write_run_info(folder, RunInfo(f"model {EVIL}", "echo_env", "cpu", num_steps, changed))
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, one of them named like markup. Tests that change something write runs of their own."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / EVIL_NAME)
    write_run(root / "other", num_steps=2, lr=EVIL)
    return root


def read_whole(*roots: Path) -> Library:
    """Return the library of these folders with every file read."""
    library = Library([root.resolve() for root in roots])
    while library._one_round():
        pass
    return library


@contextmanager
def served(library: Library) -> Generator[str]:
    """Serve the page of these runs, kept up to date, and yield its address."""
    listener = _listener(0)
    config = uvicorn.Config(make_app(library), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    library.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        library.close()
        listener.close()
