"""`skyrl export RUN`: the model of a run as a Hugging Face folder, whether the run finished, stopped or was killed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def main(words: list[str]) -> int:
    """Write the folder and say where it is; return 0."""
    options = parser().parse_args(words)
    from skyrl_train.run.model_folder import export_model
    from skyrl_train.run.saved_run import read_run

    folder = None if options.output is None else options.output.expanduser()
    saved = read_run(options.run, options.step)
    done = export_model(saved, folder, dtype=options.dtype, adapter=options.adapter, base=options.base)
    if options.json:
        print(json.dumps(asdict(done)))
    else:
        print(f"the {done.kind} of step {done.step} is in {done}")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="skyrl export", description="Write the model of a run as a Hugging Face folder."
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder (trainer.ckpt_path)")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/model, or RUN/adapter with --adapter")
    made.add_argument("--step", type=int, metavar="N", help="of this checkpoint; default: the newest")
    made.add_argument("--adapter", action="store_true", help="the adapters alone, as PEFT keeps them")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    made.add_argument("--base", type=Path, metavar="FOLDER", help="the model that the run began with, if it was moved")
    made.add_argument("--json", action="store_true", help="print folder, step, kind, dtype and bytes as JSON")
    return made
