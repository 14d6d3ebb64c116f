"""Look at a run: `python -m skyrl_train.records show RUN_FOLDER`, or `report RUN_FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from skyrl_train.console import lasting_output
from skyrl_train.files import told
from skyrl_train.run.records.report import write_report
from skyrl_train.run.records.show import show
from skyrl_train.visible import Parser, visible


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    with lasting_output():
        return _look(options)


def _look(options: argparse.Namespace) -> int:
    try:
        if options.command == "report":
            print(write_report(options.run_folder))
        else:
            pick = "best" if options.best else "worst" if options.worst else "first"
            count = options.best or options.worst or options.count
            show(options.run_folder, options.phase, options.step, pick, count, Console(highlight=False, markup=False))
    except (OSError, ValueError) as error:
        print(visible(f"error: {told(error)}"), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m skyrl_train.records", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    episodes = commands.add_parser("show", help="print episodes")
    episodes.add_argument("run_folder", type=Path, help="trainer.ckpt_path of the run")
    episodes.add_argument("--step", type=int, help="default: the last step")
    episodes.add_argument("--eval", dest="phase", action="store_const", const="eval", default="train")
    episodes.add_argument("--count", type=int, default=3, help="how many, in the order they were kept")
    order = episodes.add_mutually_exclusive_group()
    order.add_argument("--best", type=int, metavar="K", help="the K with the highest reward")
    order.add_argument("--worst", type=int, metavar="K", help="the K with the lowest reward")
    report = commands.add_parser("report", help="write report.html anew")
    report.add_argument("run_folder", type=Path, help="trainer.ckpt_path of the run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
