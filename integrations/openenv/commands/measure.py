"""The measurements of `check`: episodes of two players on one server, and processes left running afterwards."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from integrations.openenv.catalog.generic.actions import ActionForm
from integrations.openenv.catalog.generic.description import describe
from integrations.openenv.catalog.generic.observation import legal_actions
from integrations.openenv.client.errors import CapacityReached, OpenEnvError
from integrations.openenv.client.session import OpenEnvClient, open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import CLOSE, OPEN, OpenEnv
from integrations.openenv.hosting.containers import Container, container_reaper_pid
from integrations.openenv.hosting.docker_command import containers_of
from integrations.openenv.hosting.reaping import this_process
from integrations.openenv.pool.server_pool import close_shared_pools, shared_pool
from skyrl_gym.contract import wrong_step
from skyrl_gym.core import EnvFailure
from skyrl_gym.envs.base_text_env import BaseTextEnvStepOutput

MAX_SESSIONS_TRIED = 16
TIME_TO_END_S = 20.0  # for the processes of a server that was stopped
Process = tuple[int, str]  # pid and start time: a pid may be used again
HAS_PROC = Path("/proc/self/stat").exists()
NUM_REPEATED = 3  # episodes that are played twice
Player = Callable[["WatchedEnv"], str | None]  # the next reply; None: the player knows none


@dataclass(slots=True)
class PlayedEpisode:
    """A record of one episode: the actions and their results."""

    replies: list[str] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)  # fields of each action
    texts: list[str] = field(default_factory=list)  # what the model reads: the first, then one a turn
    observations: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    paid: list[bool] = field(default_factory=list)  # whether the server gave a reward in the turn, and not null
    step_s: list[float] = field(default_factory=list)
    ended: bool = False  # by the environment, not by the turns
    num_invalid: int = 0
    refusals: list[str] = field(default_factory=list)  # messages of the server, or of the parser, for those
    gold_reward: float | None = None  # the entry's promise for its gold player
    failure: str | None = None  # message of an EnvFailure

    @property
    def reward(self) -> float:
        return sum(self.rewards)


@dataclass(slots=True)
class Measurements:
    """All measurements of `check`."""

    name: str
    action: str = ""  # how an action is written, in short
    fields: list[str] = field(default_factory=list)  # of the action's schema
    first_prompts: list[str] = field(default_factory=list)
    start_s: float = 0.0
    random: list[PlayedEpisode] = field(default_factory=list)
    again: list[PlayedEpisode] = field(default_factory=list)  # the first of `random`, played again
    elsewhere: list[PlayedEpisode] = field(default_factory=list)  # `random[:-1]`, action for action on the next task
    gold: list[PlayedEpisode] = field(default_factory=list)
    num_sessions: int = 0  # that the server took at once, of MAX_SESSIONS_TRIED
    num_sessions_again: int = 0  # the same, after all of those were closed
    left_processes: list[int] | None = None  # None: unknown on this system
    left_containers: list[str] = field(default_factory=list)
    failure: str | None = None  # why nothing could be played


class WatchedEnv(OpenEnv):
    """An episode whose actions can be given as fields, for environments without a random player."""

    fields_to_send: dict[str, Any] | None = None

    def __init__(self, config: OpenEnvConfig, row: dict[str, Any]) -> None:
        super().__init__(config, row)
        self.sent: list[dict[str, Any]] = []
        self.refusals: list[str] = []

    def _get_openenv_action(self, env_name: str, action: str) -> dict[str, Any]:
        given, self.fields_to_send = self.fields_to_send, None
        fields = super()._get_openenv_action(env_name, action) if given is None else given
        self.sent.append(fields)
        return fields

    def _answer_invalid(self, message: str, reward: float = 0.0, *, ended: bool = False) -> BaseTextEnvStepOutput:
        self.refusals.append(message)
        return super()._answer_invalid(message, reward, ended=ended)


async def measure(
    config: OpenEnvConfig,
    name: str,
    rows: list[dict[str, Any]],
    *,
    began_s: float,
    before: Collection[Process] = (),
) -> Measurements:
    """Play the rows at random, repeat some, play all with the gold player; then count sessions and leftovers.

    began_s: time.monotonic() when the server was first requested.
    before: processes below this one that do not belong to the environment.
    """
    seen = Measurements(name, first_prompts=[row["prompt"][-1]["content"] for row in rows])
    try:
        form = await _action_form(config, rows[0], seen)
        seen.start_s = time.monotonic() - began_s
        for number, row in enumerate(rows):
            seen.random.append(await played(config, row, random_player(Random(number), form)))
        for row, first in list(zip(rows, seen.random, strict=True))[:NUM_REPEATED]:
            seen.again.append(await played(config, row, repeating_player(first)))
        if not seeds_differ(seen):  # not in their first text: compare the results of equal actions
            for row, before_it in zip(rows[1:], seen.random, strict=False):
                seen.elsewhere.append(await played(config, row, repeating_player(before_it)))
        seen.gold = [await played(config, row, WatchedEnv.gold_action) for row in rows]
        seen.gold = [episode for episode in seen.gold if episode.replies]
        await _count_sessions(config, rows[0], seen)
    except (OpenEnvError, EnvFailure) as failed:
        seen.failure = str(failed)
    finally:
        started = {process for process in set(descendants()) - set(before) if process[0] != container_reaper_pid()}
        containers = {server.name for _, server in shared_pool(config).servers() if isinstance(server, Container)}
        await close_shared_pools()
    if HAS_PROC:
        seen.left_processes = await _left_of(started)
    if containers:
        seen.left_containers = sorted(containers & await containers_of(this_process()))
    return seen


def seeds_differ(seen: Measurements) -> bool:
    """Return whether two tasks differ in their text before the first action, or in what the gold player does."""
    firsts = {(prompt, *episode.texts[:1]) for prompt, episode in zip(seen.first_prompts, seen.random, strict=False)}
    return len(firsts) > 1 or len({tuple(episode.replies) for episode in seen.gold}) > 1


async def _left_of(started: set[Process]) -> list[int]:
    """Return the ids of processes that do not end within TIME_TO_END_S."""
    end = time.monotonic() + TIME_TO_END_S
    while left := started & set(alive()):
        if time.monotonic() > end:
            break
        await asyncio.sleep(0.1)
    return sorted(pid for pid, _ in left)


async def played(config: OpenEnvConfig, row: dict[str, Any], player: Player) -> PlayedEpisode:
    """Play one episode of the row, until its end or until the player knows no further reply."""
    env, episode, ended = WatchedEnv(config, row), PlayedEpisode(), False
    try:
        messages, _ = await env.init_async(row["prompt"])
        episode.gold_reward = env.translator.gold_reward
        episode.texts.append(messages[-1]["content"][len(row["prompt"][-1]["content"]) :].lstrip())
        episode.observations.append(env.last.observation if env.last else {})
        while not ended and (reply := player(env)) is not None:
            start = time.perf_counter()
            output = await env.step_async(reply)
            episode.step_s.append(time.perf_counter() - start)
            if wrong := wrong_step(output):
                episode.failure = f"wrong answer of step: {wrong}"
                break
            episode.replies.append(reply)
            episode.texts.append("\n".join(message["content"] for message in output["observations"]))
            episode.observations.append(output["metadata"]["observation"])
            episode.rewards.append(output["reward"])
            episode.paid.append(output["metadata"]["server_reward"] is not None)
            ended = output["done"]
            episode.ended = ended and not output.get("truncated")
    except EnvFailure as failed:
        episode.failure = str(failed)
    finally:
        await env.close_async()
    episode.sent, episode.num_invalid, episode.refusals = env.sent, env.num_invalid_actions, env.refusals
    return episode


def random_player(random: Random, form: ActionForm | None) -> Player:
    """Return a player of random legal actions: the entry's own, else by the server's schema and observation."""

    def reply(env: WatchedEnv) -> str | None:
        text = env.translator.random_action(random)
        if text is not None:
            return env.translator.reply_with(text)
        if form is None:
            return None
        legal = legal_actions(env.last.observation if env.last else {})
        env.fields_to_send = form.fields(form.random_text(random, legal), legal)
        return f"{OPEN}{env.fields_to_send}{CLOSE}"

    return reply


def repeating_player(first: PlayedEpisode) -> Player:
    """Return a player that repeats the actions of an episode."""

    def reply(env: WatchedEnv) -> str | None:
        if env.turns >= len(first.replies):
            return None
        if not env.translator.random_action(Random(0)):
            env.fields_to_send = first.sent[env.turns]
        return first.replies[env.turns]

    return reply


async def _action_form(config: OpenEnvConfig, row: dict[str, Any], seen: Measurements) -> ActionForm | None:
    """Note the server's form of actions; return it, or None for servers before 2026, which describe none."""
    env = WatchedEnv(config, row)
    lease = await shared_pool(config).lease(env.entry.source(env.options), **env.reset_kwargs)
    try:
        about = await describe(lease)
    except OpenEnvError as silent:
        if not env.entry.is_prepared:
            raise
        seen.action = f"unknown: {silent}"
        return None
    finally:
        await lease.release()
    seen.action = about.form.kind
    seen.fields = [name for name in about.action_schema["properties"] if name != "metadata"]
    return about.form


async def _count_sessions(config: OpenEnvConfig, row: dict[str, Any], seen: Measurements) -> None:
    env = WatchedEnv(config, row)
    lease = await shared_pool(config).lease(env.entry.source(env.options), **env.reset_kwargs)  # it keeps the server up
    try:
        seen.num_sessions = 1 + await _sessions_at_once(lease.url, env.reset_kwargs)
        await asyncio.sleep(0.5)  # the server learns of a closed connection a moment later
        seen.num_sessions_again = 1 + await _sessions_at_once(lease.url, env.reset_kwargs)
    finally:
        await lease.release()


async def _sessions_at_once(url: str, kwargs: dict[str, Any]) -> int:
    async def session() -> OpenEnvClient | None:
        try:
            return (await open_session(url, kwargs, deadline_s=0.0))[0]
        except CapacityReached:
            return None

    opened = await asyncio.gather(*(session() for _ in range(MAX_SESSIONS_TRIED - 1)), return_exceptions=True)
    clients = [client for client in opened if isinstance(client, OpenEnvClient)]
    await asyncio.gather(*(client.close() for client in clients))
    for failed in opened:
        if isinstance(failed, BaseException):
            raise failed
    return len(clients)


def descendants() -> list[Process]:
    """Return every process below this one; [] on systems other than Linux."""
    parents = {pid: (parent, started) for pid, parent, started in _processes()}
    below: list[Process] = []
    for pid, (parent, started) in parents.items():
        while parent in parents and parent != os.getpid():
            parent = parents[parent][0]
        if parent == os.getpid():
            below.append((pid, started))
    return below


def alive() -> list[Process]:
    """Return every process of the machine; [] on systems other than Linux."""
    return [(pid, started) for pid, _, started in _processes()]


def _processes() -> list[tuple[int, int, str]]:
    """Return pid, parent and start time of every process except zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *rest = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            found.append((int(stat.parent.name), int(parent), rest[17]))
    return found
