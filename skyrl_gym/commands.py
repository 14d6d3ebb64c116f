"""`python -m skyrl_gym check my_module:MyEnv`: what would go wrong in training, before a model is loaded.

Needs neither torch nor the trainer.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from skyrl_gym.check import CheckReport, Fact, check_env, example_extras
from skyrl_gym.contract import Outcome, short
from skyrl_gym.error import Error
from skyrl_gym.only_json import prints_to_stderr

OWN_COLUMNS = ("prompt", "env_class")  # of the trainer; the environment does not get them


def main(words: Sequence[str] | None = None) -> int:
    """Run `check`, and return 0 if the environment keeps the contract, 1 if not, 2 if it cannot be found."""
    parser = argparse.ArgumentParser(prog="python -m skyrl_gym", description="Environments for language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_arguments(commands.add_parser("check", help="whether an environment keeps the contract"))
    return run(parser.parse_args(words))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env", metavar="ENV", help="a class of yours as my_module:MyEnv, or a registered id")
    add_rows(parser)
    add_num_rows(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_num_rows(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--num-rows", type=int, metavar="N", help="how many rows of the file are played; default: 3")


def add_rows(parser: argparse._ActionsContainer) -> None:
    """Add the arguments that say which rows are played."""
    parser.add_argument("--data", metavar="FILE", help="rows to play: .jsonl, .json or .parquet")
    parser.add_argument("--row", metavar="JSON", help="""one row to play, for example '{"answer": "42"}'""")
    parser.add_argument("--prompt-column", metavar="NAME", help="column of the rows that holds the prompt")


def refuse_rows(arguments: argparse.Namespace) -> None:
    """Refuse the arguments of `add_rows` for an environment that makes its tasks itself."""
    if (arguments.data, arguments.row, arguments.prompt_column) != (None, None, None):
        raise ValueError(
            f"--data, --row and --prompt-column are for a class of yours (my_module:MyEnv); {arguments.env} makes its "
            "own tasks: leave them out"
        )


@contextmanager
def ends_with_words() -> Generator[None]:
    """Let code that would end this process without a word say so: os._exit raises, a crash in C prints a traceback."""
    usual, this_process = os._exit, os.getpid()

    def refused(status: int) -> NoReturn:
        if os.getpid() != this_process:  # a child that the environment forked
            usual(status)
        raise RuntimeError(f"os._exit({status}) would end this process, in training the whole run")

    with patch.object(os, "_exit", refused):
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
        yield


@ends_with_words()
def run(
    arguments: argparse.Namespace, env_config: dict[str, Any] | None = None, columns: dict[str, Any] | None = None
) -> int:
    """Check the environment on some rows, print the report, and return the exit status.

    columns: what rows get that lack it.
    """
    try:
        with prints_to_stderr(wanted=arguments.json):
            rows = _rows(arguments)
            column = arguments.prompt_column or "prompt"
            reports = [_checked(arguments.env, {**(columns or {}), **row}, column, env_config) for row in rows]
    except (Error, ImportError, OSError, ValueError) as refused:
        words = _printable(" ".join(str(refused).split()))
        print(f"check: {words}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"error": words}))
        return 2
    report = _together(arguments.env, reports)
    if arguments.json:
        print(json.dumps({**asdict(report), "passed": report.passed, "num_rows": len(rows)}, indent=2))
    else:
        print(_printable("\n".join([str(report), *advice(report, rows)])))
    return 0 if report.passed else 1


def advice(report: CheckReport, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines about what keeps the contract but may teach nothing."""
    lines = [f"{len(rows)} rows, {len(report.rewards)} episodes"]
    if report.rewards:
        lines[0] += f", rewards {min(report.rewards):g} to {max(report.rewards):g}"
        if min(report.rewards) == max(report.rewards):
            lines.append("warn every episode earned the same: define gold_actions to see that a good one earns more")
    if not report.passed and not any(rows):
        lines.append("hint these episodes had an empty row; give some with --data FILE or --row JSON")
    return lines


def _checked(env: str, row: dict[str, Any], prompt_column: str, env_config: dict[str, Any] | None) -> CheckReport:
    prompt = row.get(prompt_column)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    extras = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
    for column in ("max_turns", "seed"):
        if not isinstance(extras.get(column), int | None):
            raise ValueError(f"the row's {column} must be a whole number, not {short(extras[column])}")
    return check_env(env, extras=extras, prompt=prompt, env_config=env_config)


def _together(env: str, reports: Sequence[CheckReport]) -> CheckReport:
    """Return one report of several rows: a fact holds if it holds for each."""
    facts: dict[str, Fact] = {}
    for report in reports:
        for fact in report.facts:
            if fact.name not in facts or not fact.passed:
                facts[fact.name] = fact
    return CheckReport(env, tuple(facts.values()), tuple(reward for report in reports for reward in report.rewards))


def _rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows to play: those given, else the class's own examples, else an empty one."""
    num_rows = 3 if arguments.num_rows is None else arguments.num_rows
    if num_rows < 1:
        raise ValueError(f"--num-rows={num_rows} must be at least 1")
    if arguments.row is not None:
        return [row_of(arguments.row)]
    if arguments.data is None:
        return _examples(arguments.env) or [{}]
    rows = _read(Path(arguments.data).expanduser())[:num_rows]
    if not rows:
        raise ValueError(f"there are no rows in {arguments.data}")
    return [_is_row(row) for row in rows]


def _examples(env: str) -> list[dict[str, Any]]:
    """Return the example rows of the class. ValueError if it cannot tell them."""
    offered = Outcome.of(lambda: [_is_row(row) for row in example_extras(env)])
    if isinstance(offered.error, Error | ImportError):
        raise offered.error
    if offered.error is not None:
        raise ValueError(f"example_extras of {env} raised {type(offered.error).__name__}: {short(offered.error)}")
    return offered.value


def row_of(text: str) -> dict[str, Any]:
    """Return the row of --row. ValueError if it is no JSON object."""
    return _is_row(_json(text, "--row"))


def _is_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object of columns, not {short(row)}")
    return row


def _read(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        read = Outcome.of(lambda: pyarrow.parquet.read_table(path).to_pylist())
        if read.error is not None:
            raise ValueError(f"{path} cannot be read as parquet: {read.error}")
        return read.value
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return _json(text, str(path))
    return [_json(line, f"line {i} of {path}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {error}") from error


def _printable(text: str) -> str:
    """Return the text without characters that could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
