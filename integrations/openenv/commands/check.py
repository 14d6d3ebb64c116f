"""`check`: play an environment before training in it, and report what would make training fail.

A class of the user's (my_module:MyEnv) or a registered id is checked as skyrl_gym.commands does, any other as OpenEnv.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from integrations.openenv.catalog.options import options_from_words
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.commands.arguments import add_environment, environment_config, shown, task_rows
from integrations.openenv.commands.findings import Report, Returns, report
from integrations.openenv.commands.games import is_text_environment, refuse_servers
from integrations.openenv.commands.measure import MAX_SESSIONS_TRIED, Measurements, descendants, measure
from skyrl_gym import commands as gym_commands
from skyrl_gym.only_json import prints_to_stderr
from skyrl_train.config.settings import EnvSettings
from skyrl_train.console import print_json

NUM_EPISODES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_environment(parser)
    parser.add_argument(
        "-n", "--num-episodes", type=int, metavar="N", help=f"episodes of each player; default: {NUM_EPISODES}"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    of_class = parser.add_argument_group("for a class of yours, as my_module:MyEnv")
    gym_commands.add_rows(of_class)
    gym_commands.add_num_rows(of_class)


@gym_commands.ends_with_words()
def run(arguments: argparse.Namespace) -> int:
    """Play, print the report, and return 0 if nothing in it would make training fail, else 1."""
    if is_text_environment(arguments.env):
        return _check_class(arguments)
    gym_commands.refuse_rows(arguments)
    if arguments.num_rows is not None:
        raise ValueError(f"--num-rows is for a class of yours; {arguments.env} makes its own tasks: say -n, or nothing")
    num_episodes = NUM_EPISODES if arguments.num_episodes is None else arguments.num_episodes
    if num_episodes < 1:
        raise ValueError(f"--num-episodes={num_episodes} must be at least 1")
    config = environment_config(arguments, max_sessions=4 * MAX_SESSIONS_TRIED)
    began_s, before = time.monotonic(), descendants()
    try:
        with prints_to_stderr(wanted=arguments.json):
            entry, rows = task_rows(arguments, num_episodes, config)
            checked = report(run_in_background(measure(config, entry.name, rows, began_s=began_s, before=before)))
    except OpenEnvError as failed:  # a server outside the catalog that cannot be reached
        checked = report(Measurements(arguments.env, failure=str(failed)))
    if arguments.json:
        print_json({**asdict(checked), "passed": checked.passed})
    else:
        show(checked, Console(highlight=False))
    return 0 if checked.passed else 1


def _check_class(arguments: argparse.Namespace) -> int:
    """Check an environment of skyrl_gym. --option is a setting of it, as environment.skyrl_gym.MyEnv.NAME=VALUE is."""
    refuse_servers(arguments)
    if arguments.num_episodes is not None:
        raise ValueError(f"--num-episodes is of OpenEnv's environments; for {arguments.env} say --num-rows")
    limit = {} if arguments.max_turns is None else {"max_turns": arguments.max_turns}
    columns = {"seed": arguments.seed, **limit}
    return gym_commands.run(arguments, EnvSettings(options_from_words(arguments.option)), columns)


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
