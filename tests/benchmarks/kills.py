"""kill -9 of every kind of process of a run on several, at random moments, and what becomes of the run.

    python -m tests.benchmarks.kills [--kills 30] [--seed 0] [--backend vllm] [--victims engine] [--compare]
                                      [--patience 4]

One run of a tiny model on two learner ranks and two engines, in OpenEnv's echo environment with its real server. A kill
that ends the run is followed by the same command. Prints a line for each kill and whatever is wrong; the exit status
counts that. With --compare the prompts of every step are compared with those of a run that nobody disturbed. The time
limits are those of a quiet machine; --patience multiplies them.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.benchmarks.side_by_side import ROOT
from tests.skyrl_train.cluster.runs import shared_memory_of_nobody
from tests.tiny_models import save_tiny_model

STEPS_OF_EPOCH = 10
PROMPTS, SAMPLES = 2, 4
ENDS_WITHIN_S, GOES_ON_WITHIN_S, STARTS_WITHIN_S = 40.0, 150.0, 200.0  # where nothing else runs
MARKS = {  # victim -> a word of its command line
    "rank": "ray::LearnerRank",
    "engine": "ray::EngineActor",
    "vllm": "VLLM::EngineCor",
    "server": "integrations.openenv.servers",
}
ENDS = {"driver": -signal.SIGKILL, "rank": 1}  # the victims whose death ends the run, and the exit status
TITLES = {"rank": "learner rank", "engine": "engine", "vllm": "engine"}  # in the last words of a run
PHASES = ("start", "rollout", "update", "push", "checkpoint", "any")
SHARED = ("skyrl", "plasma", "vllm", "psm_", "sem.mp-")  # in the names of shared memory
PUSHES = ("publish", "logprobs_of_tokens")


@dataclass(frozen=True)
class Kill:
    """One kill: who, when, and what became of the run."""

    victim: str
    phase: str
    step: int
    outcome: str
    seconds: float  # until the run had ended, or had made two more steps
    wrong: str  # what should have been otherwise; empty if nothing

    def __str__(self) -> str:
        return f"| {self.victim} | {self.phase} | {self.step} | {self.outcome} | {self.seconds:.1f} | {self.wrong} |"


class Started:
    """The run's process and its family."""

    def __init__(self, folder: Path, arguments: list[str], patience: float) -> None:
        self.folder, self.log, self.patience = folder, folder / "log.txt", patience
        self.left_before = shared_memory_of_nobody(SHARED)  # by others
        command = [sys.executable, "-m", "integrations.openenv.entrypoints.main_openenv", *arguments]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "0"}
        with self.log.open("ab") as log:
            self.began = log.tell()
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log)

    @property
    def output(self) -> str:
        """Return what this start has printed."""
        return self.log.read_bytes()[self.began :].decode(errors="replace")

    @property
    def last_words(self) -> str:
        return "\n" + self.output[-3000:]

    def family(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def of(self, victim: str) -> list[psutil.Process]:
        family = self.family()
        return family[:1] if victim == "driver" else [child for child in family if MARKS[victim] in words(child)]

    def step(self) -> int:
        lines = read_metrics(self.folder / "run" / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else -1

    def phase(self) -> str:
        """Return what the run is doing, by the names of methods that Ray puts into the titles of its processes."""
        if any((self.folder / "run").glob("global_step_*.writing")):
            return "checkpoint"
        doing = {words(rank).partition(".")[2].partition("(")[0] for rank in self.of("rank")} - {""}
        if any(method.startswith(PUSHES) for method in doing):
            return "push"
        return "update" if doing else "rollout"

    def left(self, family: list[psutil.Process]) -> list[str]:
        """Return what it has left behind ten seconds (times `patience`) after its end."""
        _, alive = psutil.wait_procs(family, timeout=10 * self.patience)
        shared = shared_memory_of_nobody(SHARED) - self.left_before
        return [f"left: {words(process)}" for process in alive] + [f"left in shared memory: {name}" for name in shared]

    def wait(self, until: Callable[[], bool], timeout_s: float, pause_s: float = 0.05) -> bool:
        """Return whether it came to that before the run ended or the time was over."""
        deadline = time.monotonic() + timeout_s * self.patience
        while time.monotonic() < deadline and self.process.poll() is None:
            if until():
                return True
            time.sleep(pause_s)
        return False


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def kill_one(run: Started, victim: str, wanted: str, chance: random.Random) -> Kill:
    """Kill one process of this kind in the phase that is wanted, and wait for what becomes of the run."""
    before = run.step()
    if wanted == "start":
        run.wait(lambda: bool(run.of(victim)), STARTS_WITHIN_S)
        time.sleep(chance.uniform(0.0, 8.0))
    elif not run.wait(lambda: run.step() >= before + 1 and bool(run.of(victim)), STARTS_WITHIN_S):
        return Kill(victim, wanted, before, "none", 0.0, f"no step was made: {run.last_words}")
    else:
        time.sleep(chance.uniform(0.0, 1.5))
    if wanted not in ("start", "any"):
        run.wait(lambda: run.phase() == wanted, 20.0, 0.001)
    is_starting = run.step() == before
    phase, family, victims = "start" if is_starting else run.phase(), run.family(), run.of(victim)
    if not victims:
        return Kill(victim, phase, run.step(), "none", 0.0, f"there is no {victim}: {run.last_words}")
    chance.choice(victims).send_signal(signal.SIGKILL)
    began, step = time.monotonic(), run.step()
    went_on = run.wait(lambda: run.step() >= step + 2, ENDS_WITHIN_S if victim in ENDS else GOES_ON_WITHIN_S)
    seconds, status = time.monotonic() - began, run.process.poll()
    outcome = "went on" if went_on else "hung" if status is None else f"ended, status {status}"
    wrong = run.left(family) if status is not None else []
    if status != ENDS.get(victim) and not (is_starting and victim in ("engine", "vllm") and status == 1):
        wrong.append(f"it should have {'ended' if victim in ENDS else 'gone on'}: {run.last_words}")
    says_who = re.search(rf"stopped: .*{TITLES[victim]} \d", run.output) if victim in TITLES else None
    if status == 1 and (says_who is None or "Traceback" in run.output):
        wrong.append(f"it does not say who died, or shows a traceback: {run.last_words}")
    return Kill(victim, phase, step, outcome, seconds, "; ".join(wrong))


def played(folder: Path) -> dict[int, Counter[str]]:
    """Return the prompts of every step, and how often each was played."""
    return {
        step: Counter(episode.uid for episode in read_trajectories(path))
        for step, path in trajectory_files(folder / "run", "train").items()
    }


def differences(folder: Path, unbroken: Path | None) -> Iterator[str]:
    """Yield what differs from a run that nobody disturbed."""
    steps = [int(line["step"]) for line in read_metrics(folder / "run" / "metrics.jsonl")]
    if steps != list(range(len(steps))):
        yield f"the steps on record are {steps}"
    ours = played(folder)
    for step in steps[1:]:
        if set(ours.get(step, Counter()).values()) != {SAMPLES} or len(ours[step]) != PROMPTS:
            yield f"step {step} has played {dict(ours.get(step, Counter()))}"
    theirs = played(unbroken) if unbroken is not None else {}
    for step in theirs.keys() & set(steps):
        if ours.get(step) != theirs[step]:
            yield f"step {step} has played {dict(ours[step])}, and undisturbed {dict(theirs[step])}"


def arguments(given: Path, folder: Path, epochs: int, backend: str) -> list[str]:
    return [
        f"data.train_data=['{given}/train.parquet']",
        "data.val_data=[]",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={folder}/run",
        f"trainer.export_path={folder}/run/exports",
        f"trainer.epochs={epochs}",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "trainer.strategy=fsdp2",
        "trainer.placement.policy_num_gpus_per_node=2",
        "generator.num_inference_engines=2",
        f"generator.backend={backend}",
        *(["generator.engine_init_kwargs.kv_cache_memory_bytes=67108864"] if backend == "vllm" else []),
        "environment.env_class=openenv",
        "environment.openenv.runtime=local",
        f"trainer.train_batch_size={PROMPTS}",
        f"trainer.policy_mini_batch_size={PROMPTS}",
        "trainer.ckpt_interval=1",
        "trainer.max_ckpts_to_keep=2",
        f"generator.n_samples_per_prompt={SAMPLES}",
        "generator.max_num_seqs=16",
        "generator.sampling_params.max_generate_length=48",
    ]


def plan(count: int, victims: list[str], chance: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (victim, phase) of every kill: two that the run survives, and one that ends it.

    So one start of the run serves three.
    """
    survived = [victim for victim in victims if victim not in ENDS] or [""]
    ending = [victim for victim in victims if victim in ENDS] or [""]
    order = [victim for i in range(count) for victim in (*(survived * 2)[:2], ending[i % len(ending)]) if victim]
    for i, victim in enumerate(order[:count]):
        yield victim, "start" if i % 12 in (0, 3, 5) else chance.choice(PHASES[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--skip", type=int, default=0, help="kills that an earlier call has done, with the same seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--victims", nargs="+", default=["driver", "rank", "engine", "server"])
    parser.add_argument("--folder", type=Path, help="go on with the run that is in this folder")
    parser.add_argument("--patience", type=float, default=1.0, help="what the time limits are multiplied by")
    parser.add_argument("--compare", action="store_true", help="at last with a run that nobody disturbed")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    write_given(folder)
    command = arguments(folder, folder, 10_000, options.backend)
    num_wrong, run = 0, None
    try:
        planned = list(plan(options.skip + options.kills, options.victims, chance))
        for victim, phase in planned[options.skip :]:
            if run is None or run.process.poll() is not None:
                run = Started(folder, command, options.patience)
            kill = kill_one(run, victim, phase, chance)
            num_wrong += report([str(kill)]) * bool(kill.wrong)
            if kill.wrong:
                run.process.kill()
                run.process.wait()
        if run is not None and run.process.poll() is None:
            num_wrong += report(interrupted(run))
    finally:
        if run is not None:
            run.process.kill()
    num_wrong += report(list(differences(folder, unbroken(folder, options.backend) if options.compare else None)))
    print(f"{folder}: {num_wrong} wrong")
    return num_wrong


def write_given(folder: Path) -> None:
    """Write a tiny model, and the tasks of one epoch."""
    if (folder / "train.parquet").exists():
        return
    save_tiny_model(folder / "model", head_dim=32)
    rows, _ = dataset_rows("echo_env", PROMPTS * STEPS_OF_EPOCH, 2, seed=0)
    write_parquet(rows, folder / "train.parquet")


def interrupted(run: Started) -> list[str]:
    """End a run as Ctrl-C does, and return what is wrong."""
    family = run.family()
    run.process.send_signal(signal.SIGINT)
    try:
        status = run.process.wait(ENDS_WITHIN_S * run.patience)
    except subprocess.TimeoutExpired:
        run.process.kill()
        return [f"Ctrl-C did not end the run: {run.last_words}"]
    return run.left(family) + ([f"Ctrl-C: status {status}: {run.last_words}"] if status != 130 else [])


def unbroken(folder: Path, backend: str) -> Path:
    """Play the same steps undisturbed, and return their folder."""
    last = read_metrics(folder / "run" / "metrics.jsonl")[-1]["step"]
    other = folder / "unbroken"
    other.mkdir()
    Started(other, arguments(folder, other, int(last) // STEPS_OF_EPOCH + 1, backend), 1.0).process.wait()
    return other


def report(lines: list[str]) -> int:
    """Print the lines and return how many there are."""
    print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    return len(lines)


if __name__ == "__main__":
    sys.exit(main())
