"""A whole run as a user starts it: a server killed in the middle, Ctrl-C, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from skyrl_train.run.metrics import read_metrics
from tests.tiny_models import save_tiny_model

NUM_STEPS = 10


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_tiny_model(folder / "model")
    train, validation = dataset_rows("echo_env", 2 * NUM_STEPS, 2, seed=0)
    write_parquet(train, folder / "train.parquet")
    write_parquet(validation, folder / "validation.parquet")
    return folder


@pytest.fixture
def trainer(given: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [
        f"data.train_data=['{given}/train.parquet']",
        f"data.val_data=['{given}/validation.parquet']",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={tmp_path}/run",
        f"trainer.export_path={tmp_path}/run/exports",
        "trainer.device=cpu",
        "environment.openenv.runtime=local",
        "trainer.train_batch_size=2",
        "trainer.ckpt_interval=1",
        "trainer.policy_mini_batch_size=2",
        "trainer.algorithm.use_kl_loss=false",
        "generator.n_samples_per_prompt=16",
        "generator.sampling_params.max_generate_length=64",
    ]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "integrations.openenv.entrypoints.main_openenv", *arguments],
            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        yield process
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for_step(run_folder: Path, step: int, trainer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and trainer.poll() is None:
        lines = read_metrics(run_folder / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    log = (run_folder.parent / "log.txt").read_text()
    raise AssertionError(f"step {step} was not reached:\n{log[-3000:]}")


def stop_with_sessions(trainer: subprocess.Popen[bytes], server: psutil.Process, num_sessions: int) -> None:
    """Stop the trainer in a moment in which the server has this many sessions: they stay open until it goes on."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if num_open(server) >= num_sessions:
            trainer.send_signal(signal.SIGSTOP)
            if num_open(server) >= num_sessions:
                return
            trainer.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError(f"there never were {num_sessions} sessions at once")


def num_open(server: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in server.net_connections(kind="tcp"))


def servers(trainer: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(trainer.pid).children(recursive=True)
    return [child for child in children if any("integrations.openenv.servers" in part for part in child.cmdline())]


def test_a_server_killed_in_mid_run_is_replaced_and_its_episodes_are_played_again(trainer, tmp_path):
    wait_for_step(tmp_path / "run", 2, trainer)
    family = psutil.Process(trainer.pid).children(recursive=True)
    [server] = servers(trainer)
    stop_with_sessions(trainer, server, 16)
    server.kill()
    trainer.send_signal(signal.SIGCONT)
    assert trainer.wait(400) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(NUM_STEPS + 1))
    assert lines[-1]["environment/num_server_restarts"] == 1
    assert sum(line.get("generate/retries", 0) for line in lines) >= 1
    assert sum(line.get("generate/env_failures", 0) for line in lines) == 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], "a process was left behind"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"reward_before", "reward_after", "steps", "seconds", "tokens"} <= summary.keys()
    assert summary["steps"] == NUM_STEPS


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process(trainer, tmp_path, how):
    wait_for_step(tmp_path / "run", 1, trainer)
    family = psutil.Process(trainer.pid).children(recursive=True)
    assert servers(trainer)
    trainer.send_signal(how)
    code = trainer.wait(400)
    assert code == (-how if how == signal.SIGKILL else 128 + how)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    log = (tmp_path / "log.txt").read_text()
    assert how == signal.SIGKILL or "the same command goes on after step" in log
    assert "Traceback" not in log
