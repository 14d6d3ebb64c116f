"""A tiny run, as arguments and as a program: `python -m tests.skyrl_train.cluster.runs key=value ...`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from skyrl_gym.envs import register
from skyrl_train.run.metrics import read_metrics
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[3]
NUM_STEPS = 4
TWO = ["trainer.strategy=fsdp2", "trainer.placement.policy_num_gpus_per_node=2", "generator.num_inference_engines=2"]


def write_given(folder: Path) -> Path:
    """Write a tiny model, tiny data, and what can be imitated."""
    save_tiny_model(folder / "model", head_dim=32)  # vLLM's attention on a CPU knows no smaller one
    shown = [{"prompt": f"task {i}", "response": "bdfh"} for i in range(2)]
    (folder / "shown.jsonl").write_text("\n".join(map(json.dumps, shown)))
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(2 * NUM_STEPS)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def imitating(given: Path) -> list[str]:
    """Return the settings of one step of imitation, which comes first."""
    return [f"trainer.sft.data=['{given}/shown.jsonl']", "trainer.sft.batch_size=2", "trainer.sft.lr=1e-3"]


def arguments(given: Path, run_folder: Path) -> list[str]:
    return [
        f"data.train_data=['{given}/train.jsonl']",
        "data.val_data=[]",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={run_folder}",
        f"trainer.export_path={run_folder}/exports",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "environment.env_class=even",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.ckpt_interval=1",
        "trainer.max_ckpts_to_keep=2",
        "generator.n_samples_per_prompt=4",
        "generator.max_turns=2",
        "generator.sampling_params.max_generate_length=8",
    ]


def environment() -> dict[str, str]:
    """Return the variables of a run's process: one thread each, for the tests share the cores with it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "0"}


def start(given: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a run in `given`/run."""
    command = [sys.executable, "-m", "tests.skyrl_train.cluster.runs", *arguments(given, given / "run"), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def family_after_step(step: int, run_folder: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the run's processes, once it has made this step."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(run_folder / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"step {step} was not reached:\n{process.communicate()[0][-3000:]}")


def title(process: psutil.Process) -> str:
    """Return "ray::LearnerRank", also while it runs a method and is called after that."""
    try:
        return process.cmdline()[0].partition(".")[0] if process.cmdline() else ""
    except psutil.NoSuchProcess:
        return ""


def nothing_is_left(family: list[psutil.Process]) -> bool:
    """Return whether none of these lives after a minute, and no memory that a run shares."""
    _, alive = psutil.wait_procs(family, timeout=60)
    end = time.monotonic() + 60
    while (left := shared_memory_of_nobody()) and time.monotonic() < end:  # of a test in another process, for a moment
        time.sleep(0.5)
    return not alive and not left


def shared_memory_of_nobody(kinds: Sequence[str] = ("skyrl", "plasma")) -> set[str]:
    """Return the names of shared memory with such a word that no process of this machine maps or has open."""
    names = {path.name for path in Path("/dev/shm").glob("*") if any(kind in path.name for kind in kinds)}
    for held in _held_files() if names else ():
        names = {name for name in names if name not in held}
    return names


def _held_files() -> Iterator[str]:
    """Yield, process by process, the names of the files that it maps and of those that it has open."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            yield (process / "maps").read_text(errors="replace")
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    yield os.readlink(link)


if __name__ == "__main__":
    from skyrl_train.entrypoints.main_base import main

    register("even", EvenEnv)
    sys.exit(main(sys.argv[1:]))
