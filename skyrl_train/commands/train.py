"""`skyrl train`: the trainer of SkyRL's keys, or, with --env, everything for one OpenEnv environment."""

from __future__ import annotations

import argparse
import shlex
import sys

from skyrl_train.commands.experiments import entry_point, is_openenv
from skyrl_train.visible import Parser

ABOUT = "Train a model. The same command goes on with a run that was interrupted."
MORE = """\
examples:
  skyrl train --env echo_env
  skyrl train --env echo_env trainer.epochs=2 trainer.policy.model.lora.rank=16 trainer.policy.optimizer_config.lr=2e-4
  skyrl train "data.train_data=['train.jsonl']" "data.val_data=[]" environment.env_class=gsm8k trainer.ckpt_path=~/mine

`skyrl config` prints every key. With --env the data set is made if it is missing, the run's folder is
~/ckpts/openenv/ENV (trainer.ckpt_path), and the model is one that fits this machine (trainer.policy.model.path).
"""


def main(words: list[str]) -> int:
    """Train, and return the exit status of the run (entrypoints/process.py)."""
    options = parser().parse_intermixed_args(words)
    if options.env is None and (options.gpus is not None or options.data_dir is not None):
        raise ValueError("--gpus and --data-dir complete --env; without it, set the configuration's keys")
    bare = [key for key in options.keys if "=" not in key and ("." not in key or "/" in key)]
    if options.env is None and bare:
        raise ValueError(f"{bare[0]!r} is no KEY=VALUE; an environment is named as --env {shlex.quote(bare[0])}")
    if options.env is None and not options.keys:
        raise ValueError("there is nothing to train on: add --env ENV, or data.train_data=[FILE] and other keys")
    if options.env is None:
        return entry_point(openenv=is_openenv(options.keys)).main(options.keys)
    return entry_point(openenv=True).main(words)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line, which integrations/openenv/recipe.py uses as well."""
    made = Parser(
        prog="skyrl train", description=ABOUT, epilog=MORE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--env", metavar="ENV", help="an OpenEnv environment: echo_env, an address, a folder, an app")
    made.add_argument("--gpus", type=int, metavar="N", help="0: the CPU alone; default: 1 if there is a GPU")
    made.add_argument("--data-dir", metavar="FOLDER", help="where train.parquet and validation.parquet lie")
    made.add_argument(
        "keys", nargs="*", default=[], metavar="KEY=VALUE", help="settings; a later one replaces an earlier one"
    )
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
