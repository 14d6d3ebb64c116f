"""Seconds from the start of training to 0.95 of the reward on echo_env: run_openenv.sh's recipe and TRL.

uv run python -m tests.benchmarks.learn [--seed 1] [--trl-dtype float32] [--trl-rows 8]

The same tasks, 4 prompts x 8 samples of at most 24 tokens a step, learning rate 1e-5, no evaluation, no checkpoint.
Learned is the first step whose 32 samples earn 0.95 on average. Each round has a seed of its own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.comparison import Comparison, medians
from tests.benchmarks.run_openenv import command, variables
from tests.benchmarks.side_by_side import TRL, Worker, add_trl_arguments, arguments, project, trl_settings


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; default: 1")
    parser.add_argument("--reward", type=float, default=0.95)
    add_trl_arguments(parser)
    chosen = parser.parse_args()
    settings = {
        "model": str(resolve_model(chosen.model)),
        **trl_settings(chosen),
        "num_prompts": 4,
        "samples": 8,
        "tokens": 24,
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(chosen.seed, chosen.seed + chosen.rounds):
        for side in ("ours",) if chosen.no_peers else ("ours", "trl"):
            results.setdefault(side, []).append(learned(side, settings | {"seed": seed}, chosen.reward))
    seconds = medians(results, lambda row: row["seconds"])
    Comparison(
        what=f"echo_env, from the start of training to a reward of {chosen.reward}",
        unit="s",
        ours=seconds.pop("ours"),
        peers=seconds,
        is_time=True,
        facts={
            "steps": medians(results, lambda row: len(row["rewards"])),
            "seconds_per_step": medians(results, lambda row: row["seconds"] / len(row["rewards"])),
            "seconds": {side: [round(row["seconds"], 1) for row in rows] for side, rows in results.items()},
            "trl": trl_settings(chosen),
        },
    ).print(chosen.json)


def learned(side: str, settings: dict[str, Any], enough: float) -> dict[str, Any]:
    """Run one training, in its own process and folder, up to the first step that earns enough."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        if side == "ours":
            words = command(f"trainer.policy.model.path={settings['model']}")
            worker = Worker(side, words, settings, variables("ours_learn", Path(name), os.environ["PATH"]))
        else:
            worker = Worker(side, project("trl_learn", [TRL]), {**settings, "folder": name})
        rewards: list[float] = []
        worker.start()
        try:
            while not rewards or rewards[-1] < enough:
                step = worker.read()
                rewards.append(step["reward"])
                told = f"{side}, seed {settings['seed']}: {step['seconds']:.1f} s, {step['reward']:.3f}"
                print(told, file=sys.stderr, flush=True)
        finally:
            worker.close(patience_s=0)
        return {"seconds": step["seconds"], "rewards": rewards}


if __name__ == "__main__":
    main()
