"""`play`: play an environment in the terminal, one action a line, with the texts that a model reads; or watch one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.commands.arguments import add_environment, shown
from integrations.openenv.commands.games import PlayedGame, game, limits_of
from integrations.openenv.pool.server_pool import close_shared_pools
from skyrl_gym import commands as gym_commands
from skyrl_gym.contract import Messages
from skyrl_gym.core import EnvFailure
from skyrl_gym.tool_calls import CLOSE, OPEN
from skyrl_train.engine.base import SamplingParams
from skyrl_train.files import user_path
from skyrl_train.rollout.env_calls import EnvCalls
from skyrl_train.rollout.tools_in_words import with_tools_in_words
from skyrl_train.run.run_folder import RUN_INFO
from skyrl_train.visible import visible

TOOL_HELP = f"Write a call of a tool, with or without {OPEN}{CLOSE}. An empty line shows this; ? the task; q ends."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_environment(parser, nargs="?")
    parser.add_argument(
        "--model", metavar="RUN|MODEL", help="watch this model play: a run's folder, which also names ENV, or a model"
    )
    parser.add_argument("--before", action="store_true", help="with --model: the model before training plays beside it")
    parser.add_argument(
        "--pace", type=float, metavar="S", help="with --model: seconds a move, and one game; default: Enter goes on"
    )
    gym_commands.add_rows(parser.add_argument_group("for a class of yours, as my_module:MyEnv; --seed picks the row"))


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    try:
        if arguments.model is not None:
            from integrations.openenv.commands.watch import sources_of, watch  # it loads torch

            run_in_background(watch(arguments, sources_of(arguments), Console(highlight=False)))
            return 0
        if arguments.before or arguments.pace is not None:
            raise ValueError("--before and --pace need --model RUN")
        if arguments.env is not None and (user_path(arguments.env) / RUN_INFO).is_file():
            raise ValueError(f"{arguments.env} is a run; to watch its model: skyrl play --model {arguments.env}")
        _play(game(arguments), arguments.seed, console)
    except (OpenEnvError, EnvFailure) as failed:
        print(visible(f"the environment failed: {failed}"), file=sys.stderr)
        return 1
    return 0


def _play(played: PlayedGame, seed: int, console: Console) -> None:
    """Play one episode. Lines are read in the main thread, where Ctrl-C interrupts the reading."""
    with ThreadPoolExecutor(1, "environment") as executor:
        task = played.task(seed, SamplingParams(max_tokens=1))
        env = EnvCalls(played.make, task, limits_of(played), executor)
        try:
            messages = run_in_background(env.init(task.prompt.messages))
            if tools := run_in_background(env.tool_schemas()):  # a model reads them in its chat template's form
                messages, played.help = with_tools_in_words(messages, tools), TOOL_HELP
            _show_task(messages, console)
            console.print(f"[dim]{shown(played.help)}[/]")
            earned = _turns(played, env, messages, console)
            metrics = ", ".join(f"{name} {said(value)}" for name, value in run_in_background(env.metrics()).items())
            console.print(f"[bold]The episode earned {earned:g}[/] [dim]({shown(metrics or 'no metrics')})[/]")
        finally:
            run_in_background(env.close())
            run_in_background(close_shared_pools())


def _turns(played: PlayedGame, env: EnvCalls, messages: Messages, console: Console) -> float:
    """Play until the end of the episode, "q", or the end of the input. Returns the sum of the rewards."""
    earned, turn = 0.0, 1
    while True:
        line = _read_line(console, turn)
        if line is None or line == "q":
            return earned
        if line == "?":
            _show_task(messages, console)
        elif not line:
            console.print(f"[dim]{shown(played.help)}[/]")
        else:
            step = run_in_background(env.step(played.reply(line)))
            earned += step.reward
            for message in step.observations:
                console.print(shown(message["content"]))
            console.print(f"[green]reward {step.reward:g}[/]{shown(named(step.rewards))}")
            out_of_turns = env.max_turns is not None and turn >= env.max_turns
            if step.done or out_of_turns:
                console.print("[bold]The end.[/]" if step.done and not step.truncated else "[bold]Out of turns.[/]")
                return earned
            turn += 1


def named(rewards: Mapping[str, float]) -> str:
    """Return the parts of a reward that have names, as an addition to a line; "" without any."""
    return f" ({', '.join(f'{name} {value:g}' for name, value in rewards.items())})" if rewards else ""


def said(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _show_task(messages: Messages, console: Console) -> None:
    for message in messages:
        console.print(f"[cyan]{shown(message['role'])}:[/] {shown(message['content'])}")


def _read_line(console: Console, turn: int) -> str | None:
    """Return a line of input; None at its end. A prompt is shown on a terminal only."""
    if sys.stdin.isatty():
        console.print(f"[cyan]{turn}>[/] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None
