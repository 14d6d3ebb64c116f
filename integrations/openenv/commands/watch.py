"""`play ENV --model RUN|MODEL`: the model moves and a person watches; with --before the base model plays beside it.

The episodes are played by the engine and the collector of an evaluation, with the environment's options given here.
Only what is shown waits for the person.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from integrations.openenv.commands.arguments import shown
from integrations.openenv.commands.games import PlayedGame, game, limits_of
from integrations.openenv.pool.server_pool import close_shared_pools
from skyrl_gym.contract import Messages, Step
from skyrl_gym.threads import in_daemon_thread
from skyrl_train.commands.sources import Source, source
from skyrl_train.commands.trained import Talker
from skyrl_train.engine.base import Engine
from skyrl_train.rollout.env_calls import EnvCalls
from skyrl_train.rollout.episode import Episode
from skyrl_train.rollout.sampling import sampling_params
from skyrl_train.types import Message, Trajectory


@dataclass(frozen=True, slots=True)
class Move:
    """A turn: the words of the model, the answer of the environment, and what it paid."""

    reply: str
    answer: str
    reward: float


class WatchedCalls(EnvCalls):
    """The calls of an environment, each of which a spectator sees."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.opening: asyncio.Future[Messages] = asyncio.get_running_loop().create_future()
        self.moves: asyncio.Queue[Move] = asyncio.Queue()

    async def init(self, messages: list[Message]) -> Messages:
        first = await super().init(messages)
        self.opening.set_result(first)
        return first

    async def step(self, action: str) -> Step:
        step = await super().step(action)
        answer = "\n".join(message["content"] for message in step.observations)
        self.moves.put_nowait(Move(action, answer, step.reward))
        return step


@dataclass
class Player:
    """A model at the game: its episode runs ahead, its moves are taken one by one."""

    name: str
    env: WatchedCalls
    engine: Engine
    episode: asyncio.Task[Trajectory]
    total: float = 0.0

    async def next_move(self) -> Move | None:
        """Return the next move; None once the episode has ended. Raises what ended it, if that was a failure."""
        getting = asyncio.ensure_future(self.env.moves.get())
        await asyncio.wait({getting, self.episode}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and self.env.moves.empty():
            getting.cancel()
            self.episode.result()
            return None
        move = await getting
        self.total += move.reward
        return move


def sources_of(arguments: argparse.Namespace) -> list[Source]:
    """Return who plays. ValueError for what is neither a run nor a model."""
    if arguments.pace is not None and not 0 <= arguments.pace < 3600:
        raise ValueError(f"--pace={arguments.pace} must be a number of seconds, from 0")
    after = source(arguments.model)
    return [source(arguments.model, before=True), after] if arguments.before else [after]


async def watch(arguments: argparse.Namespace, sources: Sequence[Source], console: Console) -> None:
    """Let the models play the same task, and show their moves side by side."""
    with ThreadPoolExecutor(4, "environment") as executor:
        players: list[Player] = []
        try:
            played = await asyncio.to_thread(game, arguments, sources[-1])
            for one in sources:
                players.append(await player(one, played, arguments.seed, executor))
            await show(players, console, arguments.pace)
        finally:
            for one in players:
                one.episode.cancel()
            await asyncio.gather(*(one.episode for one in players), return_exceptions=True)
            for one in players:
                await one.engine.close()
            await close_shared_pools()


async def player(of: Source, played: PlayedGame, seed: int, executor: ThreadPoolExecutor) -> Player:
    """Return a player whose episode has begun. A run's own settings say how it samples, else those of the game."""
    talker = await asyncio.to_thread(Talker, of, [] if of.settings else played.keys)
    engine = await talker.start()
    limits = limits_of(played, engine.max_model_len)
    task = played.task(seed, sampling_params(talker.cfg.generator.eval_sampling_params))
    env = WatchedCalls(played.make, task, limits, executor, played.rewards)
    episode = Episode(task, engine, talker.chat_template, limits, env)
    return Player(of.label, env, engine, asyncio.create_task(episode.play()))


async def show(players: Sequence[Player], console: Console, pace: float | None) -> None:
    """Print the task, then move by move, a column for each player, until all have ended or the person stops."""
    first = players[0]
    await asyncio.wait({first.env.opening, first.episode}, return_when=asyncio.FIRST_COMPLETED)
    if not first.env.opening.done():
        first.episode.result()  # the failure that ended it
    for message in first.env.opening.result():
        console.print(f"[cyan]{shown(message['role'])}:[/] {shown(message['content'])}")
    turn = 0
    while True:
        moves = [await one.next_move() for one in players]
        if not any(moves):
            break
        turn += 1
        console.print(board(turn, players, moves))
        if not await _goes_on(pace, console):
            break
    console.print("   ".join(f"[bold]{shown(one.name)} earned {one.total:g}[/]" for one in players))


def board(turn: int, players: Sequence[Player], moves: Sequence[Move | None]) -> Table:
    """Return one turn as a table: who plays, what each said, what came of it."""
    table = Table(title=f"turn {turn}", title_justify="left", expand=len(players) > 1)
    cells = []
    for one, move in zip(players, moves, strict=True):
        table.add_column(shown(one.name), overflow="fold", ratio=1)
        if move is None:
            cells.append("[dim]the episode is over[/]")
            continue
        paid = f"[green]reward {move.reward:g}[/] [dim](in all {one.total:g})[/]"
        cells.append("\n".join([f"[bold]{shown(move.reply)}[/]", *([shown(move.answer)] if move.answer else []), paid]))
    table.add_row(*cells)
    return table


async def _goes_on(pace: float | None, console: Console) -> bool:
    """Wait for the person: for Enter on a terminal, or for `pace` seconds. False: q, or the end of the input."""
    if pace is not None:
        await asyncio.sleep(pace)
        return True
    if not sys.stdin.isatty():
        return True
    console.print("[dim]Enter: the next move; q: the end[/] ", end="")
    line = await asyncio.wrap_future(in_daemon_thread(sys.stdin.readline))  # nothing waits for it at the end
    return bool(line) and line.strip() != "q"
