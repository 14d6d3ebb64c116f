"""Training on several ranks beside one process: does it end within the noise of seeds?

    python -m tests.benchmarks.ranks [--ranks 1 2] [--seeds 1 2 3] [--steps 16] [--folder F] [--model auto]

16 steps of 4 prompts x 8 episodes of OpenEnv's echo environment with its real server, in float32. Without --model it is
a tiny random model that imitates solutions of other tasks first, on the same ranks. Each run has a process and a folder
of its own below F, and one that has ended is not repeated. At last the table of all runs that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from skyrl_train.run.metrics import read_metrics
from tests.benchmarks.side_by_side import ROOT
from tests.tiny_models import save_tiny_model

PROMPTS = 4
LAST = 4  # steps at the end whose rewards are averaged: a step has 32 episodes only
REWARD = "reward/avg_raw_reward"


def write_given(folder: Path, num_steps: int) -> None:
    """Write a tiny model, tasks of all steps, tasks to evaluate on, and solutions of others to imitate."""
    if (folder / "shown.jsonl").exists():
        return
    save_tiny_model(folder / "model", hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.05)
    train, validation = dataset_rows("echo_env", PROMPTS * num_steps, 32, seed=0)
    write_parquet(train, folder / "train.parquet")
    write_parquet(validation, folder / "validation.parquet")
    others, _ = dataset_rows("echo_env", 256, 1, seed=1)
    shown = [
        {"prompt": row["prompt"], "response": f"<action>{row['extra_info']['solution']}</action>"} for row in others
    ]
    (folder / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))


def arguments(given: Path, run: Path, model: str | None, ranks: int, seed: int) -> list[str]:
    tiny = [
        f"trainer.policy.model.path={given}/model",
        f"trainer.sft.data=['{given}/shown.jsonl']",
        "trainer.sft.epochs=5",
        "trainer.sft.lr=5e-3",
        "trainer.policy.optimizer_config.lr=1e-3",
        "generator.sampling_params.max_generate_length=48",
    ]
    real = [
        f"trainer.policy.model.path={model}",
        "trainer.policy.optimizer_config.lr=1e-5",
        "generator.sampling_params.max_generate_length=24",
        "trainer.gradient_checkpointing=false",
        "trainer.max_tokens_per_microbatch=2048",
    ]
    several = [
        "trainer.strategy=fsdp2",
        f"trainer.placement.policy_num_gpus_per_node={ranks}",
        f"generator.num_inference_engines={ranks}",
    ]
    return [
        f"data.train_data=['{given}/train.parquet']",
        f"data.val_data=['{given}/validation.parquet']",
        f"trainer.ckpt_path={run}",
        f"trainer.export_path={run}/exports",
        f"trainer.seed={seed}",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "trainer.epochs=1",
        "trainer.eval_before_train=false",
        "trainer.eval_interval=1000",
        "trainer.ckpt_interval=-1",
        "trainer.save_model=false",
        "trainer.algorithm.use_kl_loss=false",
        "environment.env_class=openenv",
        "environment.openenv.runtime=local",
        f"trainer.train_batch_size={PROMPTS}",
        f"trainer.policy_mini_batch_size={PROMPTS}",
        "generator.n_samples_per_prompt=8",
        *(tiny if model is None else real),
        *(several if ranks > 1 else []),
    ]


def rewards(run: Path) -> list[float]:
    """Return the reward of every step of RL."""
    return [line[REWARD] for line in read_metrics(run / "metrics.jsonl") if REWARD in line]


def seconds(run: Path) -> float:
    """Return the seconds of the steps of RL."""
    return sum(line["timing/step"] for line in read_metrics(run / "metrics.jsonl") if REWARD in line)


def train(given: Path, run: Path, model: str | None, ranks: int, seed: int) -> None:
    """Make one run. RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "integrations.openenv.entrypoints.main_openenv"]
    command += arguments(given, run, model, ranks, seed)
    began = time.monotonic()
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"status {ended.returncode}:\n{ended.stdout[-1500:]}\n{ended.stderr[-1500:]}")
    print(f"{ranks} ranks, seed {seed}: {time.monotonic() - began:.0f} s in all", file=sys.stderr, flush=True)


def table(folder: Path, num_steps: int) -> list[str]:
    """Return the lines of a table in Markdown: a row for each number of ranks, then how far apart their means are."""
    lines = [
        f"| ranks | seeds | reward of the first step | mean reward of the last {LAST} steps | mean and deviation | "
        "evaluation at the end | seconds of the steps |",
        "|---|---|---|---|---|---|---|",
    ]
    ends: dict[int, list[float]] = {}
    for of_ranks in sorted(folder.glob("ranks_*"), key=lambda path: int(path.name.removeprefix("ranks_"))):
        runs = [run for run in sorted(of_ranks.glob("seed_*")) if len(rewards(run)) == num_steps]
        if not runs:
            continue
        ranks = int(of_ranks.name.removeprefix("ranks_"))
        ends[ranks] = [mean(rewards(run)[-LAST:]) for run in runs]
        lines.append(
            f"| {ranks} | {', '.join(run.name.removeprefix('seed_') for run in runs)} "
            f"| {listed(rewards(run)[0] for run in runs)} | {listed(ends[ranks])} "
            f"| {mean(ends[ranks]):.3f}" + (f" ± {stdev(ends[ranks]):.3f}" if len(runs) > 1 else "") + " "
            f"| {listed(read_metrics(run / 'metrics.jsonl')[-1]['eval/all/avg_score'] for run in runs)} "
            f"| {', '.join(f'{seconds(run):.0f}' for run in runs)} |"
        )
    one = ends.get(1, [])
    if len(one) > 1:
        for ranks, values in ends.items():
            if ranks > 1:
                apart = abs(mean(values) - mean(one))
                lines.append(f"\n{ranks} ranks: {apart:.3f} from one process, whose seeds deviate by {stdev(one):.3f}")
    return lines


def listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.3f}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--model", help="folder or name; none: a tiny random one")
    parser.add_argument("--folder", type=Path, help="go on in this folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_given(folder, options.steps)
    for seed in options.seeds:
        for ranks in options.ranks:
            run = folder / f"ranks_{ranks}" / f"seed_{seed}"
            if len(rewards(run)) < options.steps:
                train(folder, run, options.model, ranks, seed)
    print(*table(folder, options.steps), f"\n{folder}", sep="\n")


if __name__ == "__main__":
    main()
