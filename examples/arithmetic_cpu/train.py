"""Train on one-digit sums: makes the rows, and takes settings from config.yaml, then from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from skyrl_gym.envs.arithmetic import rows
from skyrl_train.entrypoints.main_base import asks_for_help, main

HERE = Path(__file__).parent
RUN_FOLDER = Path.home() / "ckpts" / "arithmetic_cpu"
NUM_TRAIN, NUM_VALIDATION = 128, 32


def data_file(split: Literal["train", "validation"], num: int) -> Path:
    path = RUN_FOLDER / "data" / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(num, split=split, digits=1)))
    return path


def settings() -> list[str]:
    """Return config.yaml, completed with the paths of data and results, as key=value arguments."""
    config = OmegaConf.load(HERE / "config.yaml")
    config.data = {
        "train_data": [str(data_file("train", NUM_TRAIN))],
        "val_data": [str(data_file("validation", NUM_VALIDATION))],
    }
    config.trainer.ckpt_path = str(RUN_FOLDER)
    config.trainer.export_path = str(RUN_FOLDER / "exports")
    return flat(OmegaConf.to_container(config))


def flat(section: object, prefix: str = "") -> list[str]:
    if isinstance(section, dict):
        return [
            setting for key, value in section.items() for setting in flat(value, f"{prefix}.{key}" if prefix else key)
        ]
    return [f"{prefix}={json.dumps(section)}"]


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words if asks_for_help(words) else [*settings(), *words]))
