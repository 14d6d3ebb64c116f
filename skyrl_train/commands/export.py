"""`skyrl export RUN`: the model of a run as a Hugging Face folder or a GGUF file, however the run ended."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from skyrl_train.visible import Parser

DTYPES, OF_GGUF = ("bfloat16", "float16", "float32"), "q8_0"


def main(words: list[str]) -> int:
    """Write the folder and say where it is; return 0."""
    options = parser().parse_args(words)
    is_gguf = options.format == "gguf"
    if is_gguf and options.adapter:
        raise ValueError("--adapter writes PEFT's format, and --format gguf the whole model; choose one")
    if options.dtype == OF_GGUF and not is_gguf:
        raise ValueError(f"--dtype {OF_GGUF} is for --format gguf")
    from skyrl_train.console import print_json
    from skyrl_train.files import user_path
    from skyrl_train.run.model_folder import export_gguf, export_model
    from skyrl_train.run.saved_run import read_run
    from skyrl_train.visible import visible

    output = None if options.output is None else user_path(options.output)
    saved = read_run(options.run, options.step)
    if is_gguf:
        done = export_gguf(saved, output, dtype=options.dtype, base=options.base)
    else:
        done = export_model(saved, output, dtype=options.dtype, adapter=options.adapter, base=options.base)
    if options.json:
        print_json(asdict(done))
    else:
        print(visible(f"the {done.kind} of step {done.step} is in {done}"))
    return 0


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="skyrl export", description="Write the model of a run as a Hugging Face folder, or as a GGUF file."
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder (trainer.ckpt_path)")
    made.add_argument(
        "--output", type=Path, metavar="PATH", help="default: RUN/model, RUN/adapter, or the file RUN/model.gguf"
    )
    made.add_argument(
        "--format", choices=("folder", "gguf"), default="folder", help="gguf: for llama.cpp, Ollama, LM Studio"
    )
    made.add_argument("--step", type=int, metavar="N", help="of this checkpoint; default: the newest")
    made.add_argument("--adapter", action="store_true", help="the adapters alone, as PEFT keeps them")
    made.add_argument(
        "--dtype",
        choices=(*DTYPES, OF_GGUF),
        default="bfloat16",
        help="default: bfloat16, what a run in bfloat16 samples from; float32: the optimizer's own weights",
    )
    made.add_argument("--base", type=Path, metavar="FOLDER", help="the model that the run began with, if it was moved")
    made.add_argument("--json", action="store_true", help="print folder, step, kind, dtype and bytes as JSON")
    return made
