"""Seconds from the command to the first sampled token, everything installed: run_openenv.sh, transformers and TRL.

uv run python -m tests.benchmarks.startup

`ours` is `bash run_openenv.sh` for echo_env with its data set made; `ours_first` makes the data set, too. transformers
only imports, loads and samples one token; TRL's trainer does so in echo_env's task.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.comparison import Comparison
from tests.benchmarks.run_openenv import command, variables
from tests.benchmarks.side_by_side import TRL, Worker, arguments, project

Stages = dict[str, float]  # seconds that each took


def main() -> None:
    chosen = arguments(__doc__ or "").parse_args()
    model = str(resolve_model(chosen.model))
    runs: dict[str, list[Stages]] = {}
    for _ in range(chosen.rounds):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            for side, stages in one_round(Path(name), model, with_peers=not chosen.no_peers).items():
                runs.setdefault(side, []).append(stages)
    seconds = {side: median(sum(stages.values()) for stages in of_side) for side, of_side in runs.items()}
    Comparison(
        what="from the command to the first sampled token",
        unit="s",
        ours=seconds.pop("ours"),
        peers={side: taken for side, taken in seconds.items() if side != "ours_first"},
        is_time=True,
        facts={
            "ours_first": seconds["ours_first"],
            "stages": {
                side: {stage: round(median(stages[stage] for stages in of_side), 2) for stage in of_side[0]}
                for side, of_side in runs.items()
            },
        },
    ).print(chosen.json)


def one_round(folder: Path, model: str, *, with_peers: bool) -> dict[str, Stages]:
    trl = {"folder": str(folder), "num_prompts": 4, "samples": 8, "rows": 32, "dtype": "bfloat16"}
    ours = command(f"trainer.policy.model.path={model}")
    environment = variables("ours_startup", folder, os.environ["PATH"])
    taken = {side: stages_of(ours, {}, environment) for side in ("ours_first", "ours")}
    if with_peers:
        taken["transformers"] = stages_of(project("transformers_startup"), {"model": model})
        taken["trl"] = stages_of(project("trl_startup", [TRL]), trl | {"model": model})
    return taken


def stages_of(words: Sequence[str], settings: dict[str, Any], environment: Mapping[str, str] | None = None) -> Stages:
    """Run a command up to its first token; return the seconds of each stage, whose end the worker reports."""
    worker = Worker(words[0], words, settings, environment)
    began = time.time()
    worker.start()
    try:
        ends = {"command": began, **worker.read()["stages"]}
    finally:
        worker.close(patience_s=0)
    return {stage: end - start for (_, start), (stage, end) in pairwise(ends.items())}


if __name__ == "__main__":
    main()
