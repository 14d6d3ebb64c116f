"""`play`: play an environment in the terminal, one action a line, with the texts that a model reads; or watch one."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from rich.console import Console

from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.commands.arguments import add_environment, environment_config, shown, task_rows
from integrations.openenv.env import CLOSE, OPEN, OpenEnv
from integrations.openenv.pool.server_pool import close_shared_pools
from skyrl_gym.core import EnvFailure
from skyrl_train.visible import visible

HELP = f"Write an action, with or without {OPEN}{CLOSE}. An empty line shows this; ? the task again; q ends."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_environment(parser)
    parser.add_argument("--model", metavar="RUN|MODEL", help="watch this model play: a run's folder, a model")
    parser.add_argument("--before", action="store_true", help="with --model: the model before training plays beside it")
    parser.add_argument("--pace", type=float, metavar="S", help="with --model: seconds a move; default: Enter goes on")


def run(arguments: argparse.Namespace) -> int:
    config = environment_config(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        if arguments.model is not None:
            from integrations.openenv.commands.watch import sources_of, watch  # it loads torch

            run_in_background(watch(arguments, sources_of(arguments), Console(highlight=False)))
            return 0
        if arguments.before or arguments.pace is not None:
            raise ValueError("--before and --pace need --model RUN")
        _, [row] = task_rows(arguments, 1, config)
        env = OpenEnv(config, row)
        run_in_background(_play(env, row["prompt"], console))
    except (OpenEnvError, EnvFailure) as failed:
        print(visible(f"the environment failed: {failed}"), file=sys.stderr)
        return 1
    return 0


async def _play(env: OpenEnv, prompt: Any, console: Console) -> None:
    try:
        messages, _ = await env.init_async(prompt)
        _show_task(messages, console)
        console.print(f"[dim]{HELP}[/]")
        earned = await _turns(env, messages, console)
        metrics = ", ".join(f"{name} {value:g}" for name, value in env.get_metrics().items())
        console.print(f"[bold]The episode earned {earned:g}[/] [dim]({shown(metrics)})[/]")
    finally:
        await env.close_async()
        await close_shared_pools()


async def _turns(env: OpenEnv, messages: Any, console: Console) -> float:
    """Play until the end of the episode, "q", or the end of the input. Returns the sum of the rewards."""
    earned = 0.0
    while True:
        line = await asyncio.to_thread(_read_line, console, env.turns + 1)
        if line is None or line == "q":
            return earned
        if line == "?":
            _show_task(messages, console)
        elif not line:
            console.print(f"[dim]{HELP}[/]")
        else:
            output = await env.step_async(line if OPEN in line else env.translator.reply_with(line))
            earned += output["reward"] or 0.0
            for message in output["observations"]:
                console.print(shown(message["content"]))
            console.print(f"[green]reward {output['reward']:g}[/]")
            if output["done"]:
                console.print("[bold]Out of turns.[/]" if output.get("truncated") else "[bold]The end.[/]")
                return earned


def _show_task(messages: Any, console: Console) -> None:
    for message in messages:
        console.print(f"[cyan]{shown(message['role'])}:[/] {shown(message['content'])}")


def _read_line(console: Console, turn: int) -> str | None:
    """Return a line of input; None at its end. A prompt is shown on a terminal only."""
    if sys.stdin.isatty():
        console.print(f"[cyan]{turn}>[/] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None
