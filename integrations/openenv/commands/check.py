"""`check`: play an environment before training in it, and report what would make training fail.

A class of the user's (my_module:MyEnv) or a registered id is checked as skyrl_gym.commands does, any other as OpenEnv.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

import skyrl_gym
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.commands.arguments import add_environment, environment_config, shown, task_rows
from integrations.openenv.commands.findings import Report, Returns, report
from integrations.openenv.commands.measure import MAX_SESSIONS_TRIED, Measurements, descendants, measure
from skyrl_gym import commands as gym_commands
from skyrl_gym.contract import Outcome
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_gym.error import Error
from skyrl_gym.importing import import_named, is_import_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_environment(parser)
    parser.add_argument("-n", "--num-episodes", type=int, default=20, help="episodes of each player")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    of_class = parser.add_argument_group("for a class of yours, as my_module:MyEnv")
    gym_commands.add_rows(of_class)


def run(arguments: argparse.Namespace) -> int:
    """Play, print the report, and return 0 if nothing in it would make training fail, else 1."""
    if is_text_environment(arguments.env):
        return gym_commands.run(arguments)
    if arguments.num_episodes < 1:
        raise ValueError(f"--num-episodes={arguments.num_episodes} must be at least 1")
    config = environment_config(arguments, max_sessions=4 * MAX_SESSIONS_TRIED)
    began_s, before = time.monotonic(), descendants()
    try:
        entry, rows = task_rows(arguments, arguments.num_episodes, config)
        checked = report(run_in_background(measure(config, entry.name, rows, began_s=began_s, before=before)))
    except OpenEnvError as failed:  # a server outside the catalog that cannot be reached
        checked = report(Measurements(arguments.env, failure=str(failed)))
    if arguments.json:
        print(json.dumps({**asdict(checked), "passed": checked.passed}, indent=2))
    else:
        show(checked, Console(highlight=False))
    return 0 if checked.passed else 1


def is_text_environment(name: str) -> bool:
    """Return whether this is an environment of skyrl_gym: a registered id, or a class that can be imported."""
    if name in skyrl_gym.registry and name != "openenv":
        return True
    if not is_import_path(name):
        return False
    found = Outcome.of(lambda: import_named(name))
    if isinstance(found.error, Error):  # there is no such module or name: "echo_env:latest" is an image
        return False
    if found.error is not None:
        raise ValueError(f"{name} cannot be imported: {type(found.error).__name__}: {found.error}") from found.error
    return isinstance(found.value, type) and issubclass(found.value, BaseTextEnv)


def show(checked: Report, console: Console) -> None:
    table = Table(title=f"check of {shown(checked.name)}", title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in _lines(checked):
        table.add_row(name, shown(value))
    if checked.random is not None or checked.gold is not None:
        console.print(table)
    for finding in checked.findings:
        colour = "red" if finding.level == "fail" else "yellow"
        console.print(f"[{colour}]{finding.level}[/]  {shown(finding.words)}", soft_wrap=True)
    failures = sum(finding.level == "fail" for finding in checked.findings)
    console.print(
        "[green]Nothing here would make training fail.[/]" if checked.passed else f"[red]{failures} to fix.[/]"
    )


def _lines(checked: Report) -> list[tuple[str, str]]:
    left = checked.left_processes
    return [
        ("action", f"{checked.action} ({', '.join(checked.fields)})"),
        ("server ready", f"in {checked.start_s:.1f} s"),
        ("random play", _returns(checked.random)),
        ("gold play", _returns(checked.gold)),
        ("same seed repeats", "yes" if checked.repeats else "no"),
        ("seeds differ", "yes" if checked.tasks_differ else "no"),
        ("step", _latency(checked)),
        ("sessions at once", f"{checked.num_sessions} of {MAX_SESSIONS_TRIED} tried"),
        ("longest text", f"{checked.longest_text_chars} characters"),
        (
            "left behind",
            f"{'?' if left is None else len(left)} processes, {len(checked.left_containers)} containers",
        ),
    ]


def _returns(returns: Returns | None) -> str:
    if returns is None:
        return "no player is known"
    return (
        f"reward {returns.mean:.3g} ± {returns.std:.3g} ({returns.low:.3g} to {returns.high:.3g}), "
        f"{returns.ended:.0%} ended by itself, {returns.invalid:.0%} of actions refused, "
        f"{returns.num_episodes} episodes"
    )


def _latency(checked: Report) -> str:
    if checked.step_ms_median is None or checked.step_ms_p99 is None:
        return "none was made"
    return f"{checked.step_ms_median:.1f} ms in the median, {checked.step_ms_p99:.1f} ms for the slowest 1 in 100"
