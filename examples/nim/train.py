"""Show SmolLM2-135M-Instruct what moves look like, then let it play Nim against a perfect player until it wins."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from omegaconf import OmegaConf

from examples.arithmetic_cpu.train import flat
from examples.nim.game import STARTS, prompt, random_game
from skyrl_train.entrypoints.main_base import asks_for_help, main

RUN_FOLDER = Path.home() / "ckpts" / "nim"
NUM_SHOWN = 7 * 32


def settings() -> list[str]:
    """Return config.yaml, completed with the paths of data and results, as key=value arguments."""
    config = OmegaConf.load(Path(__file__).parent / "config.yaml")
    random = Random(0)
    starts = [{"prompt": prompt(sticks), "sticks": sticks, "data_source": "nim"} for sticks in STARTS]
    tasks = data_file("starts", starts)
    config.data = {"train_data": [tasks], "val_data": [tasks]}
    config.trainer.sft.data = [data_file("random_games", ({"messages": random_game(random)} for _ in range(NUM_SHOWN)))]
    config.trainer.ckpt_path = str(RUN_FOLDER)
    config.trainer.export_path = str(RUN_FOLDER / "exports")
    return flat(OmegaConf.to_container(config))


def data_file(name: str, rows: Iterable[dict[str, Any]]) -> str:
    path = RUN_FOLDER / "data" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words if asks_for_help(words) else [*settings(), *words]))
