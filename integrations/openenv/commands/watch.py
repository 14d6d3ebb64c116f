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
from itertools import count
from typing import Any

from rich.console import Console
from rich.table import Table

from integrations.openenv.commands.arguments import changed, shown
from integrations.openenv.commands.games import PlayedGame, game, limits_of
from integrations.openenv.commands.watched_run import WatchedRun
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
    """A model that plays game after game."""

    name: str
    talker: Talker
    engine: Engine
    total: float = 0.0

    @classmethod
    async def of(cls, source: Source, keys: Sequence[str]) -> Player:
        """Return a player with its model. keys: how it samples, unless it brings the settings of its run."""
        talker = await asyncio.to_thread(Talker, source, [] if source.settings else keys)
        return cls(source.label.removeprefix(f"{source.named} "), talker, await talker.start())

    def begin(self, played: PlayedGame, seed: int, executor: ThreadPoolExecutor) -> WatchedGame:
        """Begin a game."""
        limits = limits_of(played, self.engine.max_model_len)
        task = played.task(seed, sampling_params(self.talker.cfg.generator.eval_sampling_params))
        env = WatchedCalls(played.make, task, limits, executor, played.rewards)
        episode = Episode(task, self.engine, self.talker.chat_template, limits, env)
        return WatchedGame(self.name, env, asyncio.create_task(episode.play()))


@dataclass
class WatchedGame:
    """A game of a player: its episode runs ahead, its moves are taken one by one."""

    name: str
    env: WatchedCalls
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

    async def end(self) -> None:
        self.episode.cancel()
        await asyncio.gather(self.episode, return_exceptions=True)


def sources_of(arguments: argparse.Namespace) -> list[Source]:
    """Return who plays. ValueError for what is neither a run nor a model."""
    if arguments.pace is not None and not 0 <= arguments.pace < 3600:
        raise ValueError(f"--pace={arguments.pace} must be a number of seconds, from 0")
    after = source(arguments.model)
    return [source(arguments.model, before=True), after] if arguments.before else [after]


async def watch(arguments: argparse.Namespace, sources: Sequence[Source], console: Console) -> None:
    """Let the models play the same task, and show their moves side by side; then the next seed's, if the person asks.

    With --pace, or without a terminal, one game is shown.
    """
    players: list[Player] = []
    with ThreadPoolExecutor(4, "environment") as executor:
        try:
            trained = sources[-1]
            run = await asyncio.to_thread(WatchedRun.of, trained) if trained.names_environment else None
            played = await asyncio.to_thread(game, arguments, run)
            for one in sources:
                players.append(await Player.of(one, played.keys))
            for seed in count(arguments.seed):
                if seed != arguments.seed:
                    console.rule(f"--seed {seed}", align="left")
                    played = await asyncio.to_thread(game, changed(arguments, seed=seed), run)
                games = [one.begin(played, seed, executor) for one in players]
                try:
                    goes_on = await show(games, console, arguments.pace)
                finally:
                    for one in games:
                        await one.end()
                for player, one in zip(players, games, strict=True):
                    player.total += one.total
                played_out = seed - arguments.seed + 1
                in_all = f" [dim](in {played_out} games)[/]" if played_out > 1 else ""
                console.print(
                    "   ".join(f"[bold]{shown(one.name)} earned {one.total:g}[/]" for one in players) + in_all
                )
                if not goes_on or not (arguments.pace is None and await _says_yes("the next game", console)):
                    break
        finally:
            for one in players:
                await one.engine.close()
            await close_shared_pools()


async def show(games: Sequence[WatchedGame], console: Console, pace: float | None) -> bool:
    """Print the task, then move by move, a column for each player. Returns False if the person stopped it."""
    first = games[0]
    await asyncio.wait({first.env.opening, first.episode}, return_when=asyncio.FIRST_COMPLETED)
    if not first.env.opening.done():
        first.episode.result()  # the failure that ended it
    for message in first.env.opening.result():
        console.print(f"[cyan]{shown(message['role'])}:[/] {shown(message['content'])}")
    for turn in count(1):
        moves = [await one.next_move() for one in games]
        if not any(moves):
            break
        if turn > 1 and not await _goes_on(pace, console):
            return False
        console.print(board(turn, games, moves))
    return True


def board(turn: int, players: Sequence[WatchedGame], moves: Sequence[Move | None]) -> Table:
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
    """Wait before a move: for the person at a terminal, or for `pace` seconds. False: the person ends it."""
    if pace is not None:
        await asyncio.sleep(pace)
        return True
    return not sys.stdin.isatty() or await _says_yes("the next move", console)


async def _says_yes(to: str, console: Console) -> bool:
    """Return whether the person at the terminal presses Enter; False: q, the end of the input, or no terminal."""
    if not sys.stdin.isatty():
        return False
    console.print(f"[dim]Enter: {to}; q: the end[/] ", end="")
    line = await asyncio.wrap_future(in_daemon_thread(sys.stdin.readline))  # nothing waits for it at the end
    return bool(line) and line.strip() != "q"
