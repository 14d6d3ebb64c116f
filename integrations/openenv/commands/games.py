"""The task that `play` plays: of an OpenEnv environment, or of a skyrl_gym one (a registered id, a class of yours)."""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import skyrl_gym
from integrations.openenv.catalog import catalog_entry
from integrations.openenv.catalog.options import options_from_words
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.commands.arguments import changed, environment_config, task_rows
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import CLOSE, OPEN, OpenEnv
from integrations.openenv.hosting.launch import preflight
from integrations.openenv.recipe import recipe
from skyrl_gym import commands as gym_commands
from skyrl_gym.check import example_extras
from skyrl_gym.contract import Outcome
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_gym.error import Error
from skyrl_gym.importing import import_named, is_import_path
from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.task import EpisodeLimits, EpisodeTask
from skyrl_train.types import Prompt
from skyrl_train.visible import words_of

if TYPE_CHECKING:
    from integrations.openenv.commands.watched_run import PlacedRow, WatchedRun
    from skyrl_train.config import SkyRLConfig
    from skyrl_train.rollout.rewards import Rewards

BEGIN = "Please begin."  # the prompt of a row that has none
TIMEOUT_S = 600.0  # of the environment's calls


@dataclass
class PlayedGame:
    """One task and its environment. `make` is called once for each player."""

    prompt: Prompt
    max_turns: int | None = None  # of a row that has no limit of its own; None: the environment decides
    rewards: Rewards | None = None  # what pays the turns, where that is not the environment alone
    keys: list[str] = field(default_factory=list)  # how a model samples that brings no settings of a run
    help: str = "Write a reply. An empty line shows this; ? the task again; q ends."

    def make(self, env_class: str, extras: dict[str, Any]) -> BaseTextEnv:
        raise NotImplementedError

    def reply(self, line: str) -> str:
        """Return the reply of a person who types this line."""
        return line

    def task(self, seed: int, sampling: SamplingParams) -> EpisodeTask:
        prompt = replace(self.prompt, uid="0")
        return EpisodeTask(prompt, 0, env_seed=seed, sampling=sampling, sampling_seed=seed, round_name="play")


@dataclass
class OpenEnvGame(PlayedGame):
    config: OpenEnvConfig = field(default_factory=OpenEnvConfig)
    env: OpenEnv | None = None  # the last one that was made

    def make(self, env_class: str, extras: dict[str, Any]) -> BaseTextEnv:
        self.env = OpenEnv(self.config, extras)
        return self.env

    def reply(self, line: str) -> str:
        assert self.env is not None
        return line if OPEN in line else self.env.translator.reply_with(line)


@dataclass
class TextGame(PlayedGame):
    env_config: Any = field(default_factory=dict)

    def make(self, env_class: str, extras: dict[str, Any]) -> BaseTextEnv:
        made: Any = skyrl_gym.make(env_class, env_config=self.env_config, extras=extras)
        return made


def game(arguments: argparse.Namespace, run: WatchedRun | None = None) -> PlayedGame:
    """Return what the command line names. ValueError for what cannot be played.

    run: of the model that is watched. If it was trained in this environment, it plays as in its run: with the run's
    validation data, settings of the environment, turns and rewards, as far as the command line does not say otherwise.
    Where the command line names no environment, the run does.
    """
    if arguments.env is None:
        if run is None:
            raise ValueError(
                "name an environment, or a run of this machine with --model: it says in which one it was trained"
            )
        arguments = changed(arguments, env=run.environment_at(arguments.seed))
    if is_text_environment(arguments.env):
        return _text_game(arguments, run)
    gym_commands.refuse_rows(arguments)
    return _openenv_game(arguments, run)


def limits_of(played: PlayedGame, max_context: int = 1) -> EpisodeLimits:
    """Return the limits of an episode; max_context: tokens that the model reads, of whom plays by hand none."""
    return EpisodeLimits(
        max_turns=played.max_turns,
        max_input_length=max_context,
        max_context=max_context,
        step_timeout_s=TIMEOUT_S,
        episode_timeout_s=TIMEOUT_S,
    )


def is_text_environment(name: str) -> bool:
    """Return whether this is an environment of skyrl_gym: a registered id, or a class that can be imported."""
    if name in skyrl_gym.registry and name != "openenv":
        return True
    if not is_import_path(name):
        return False
    found = Outcome.of(lambda: import_named(name))
    if isinstance(found.error, Error):
        module, _, last = name.partition(":")
        if module in sys.modules or last[0].isupper():  # classes are named so, tags of images hardly ever
            raise ValueError(f"{found.error}; for an image write image:{name}") from found.error
        return False  # there is no such module: "echo_env:latest" is an image
    if found.error is not None:
        raise ValueError(f"{name} cannot be imported: {type(found.error).__name__}: {found.error}") from found.error
    if isinstance(found.value, type) and issubclass(found.value, BaseTextEnv):
        return True
    if isinstance(found.value, type) or "." not in name:  # with a dot it may be the app of a server
        raise ValueError(
            f"{name} is no environment: it is {_kind_of(found.value)}, and not a class derived from "
            f"skyrl_gym.envs.base_text_env.BaseTextEnv; for an image write image:{name}"
        )
    return False


def _kind_of(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def refuse_servers(arguments: argparse.Namespace) -> None:
    """Refuse arguments that say where a server is: an environment of skyrl_gym has none."""
    if arguments.runtime != "auto" or arguments.url is not None:
        raise ValueError(f"--runtime and --url are of OpenEnv's servers, and {arguments.env} has none; leave them out")


def _openenv_game(arguments: argparse.Namespace, run: WatchedRun | None) -> OpenEnvGame:
    from skyrl_train.prompts import row_prompt

    config, entry = environment_config(arguments), catalog_entry(arguments.env)
    rows = run.rows_of(arguments.env) if run and not arguments.option else []
    if run and rows:
        trained = run.cfg.environment.openenv
        names = [*trained.env_names, arguments.env]
        config = replace(trained, runtime=config.runtime, url=config.url, env_names=names)
        place, row = _pick(rows, arguments.seed)
        row = {**row, "env_name": arguments.env}  # a folder may lie somewhere else by now
        if arguments.max_turns is not None:
            row["max_turns"] = arguments.max_turns
    else:
        place, [row] = "the task", task_rows(arguments, 1, config)[1]
    made = OpenEnvGame(row_prompt(place, row, "openenv"), config=config)
    if run and rows:
        _play_as_in(run.cfg, made)
    made.help = f"Write an action, with or without {OPEN}{CLOSE}. An empty line shows this; ? the task again; q ends."
    made.keys = [
        key for key in recipe(entry, Path(), 0, on_cpu=True) if key.startswith("generator.") and "max_turns" not in key
    ]
    env = OpenEnv(config, row)  # options that the environment refuses, before a model is loaded
    try:
        run_in_background(preflight([env.entry.source(env.options)], config))
    except OpenEnvError as missing:
        raise ValueError(str(missing)) from missing
    return made


def _text_game(arguments: argparse.Namespace, of_run: WatchedRun | None) -> TextGame:
    from skyrl_train.config import EnvironmentConfig, env_config_for
    from skyrl_train.config.settings import EnvSettings
    from skyrl_train.entrypoints.data_parts import look_up_environment
    from skyrl_train.prompts import refuse_unknown_environments, row_prompt

    refuse_servers(arguments)
    name = arguments.env
    rows = of_run.rows_of(name) if of_run else []
    run = of_run.cfg if of_run and (rows or of_run.cfg.environment.env_class == name) else None
    column = arguments.prompt_column or (run.data.prompt_column if run else "prompt")
    place, row = _row(arguments, rows, column)
    limit = {} if arguments.max_turns is None else {"max_turns": arguments.max_turns}
    prompt = row_prompt(place, {**row, **limit, "env_class": name}, name, column)
    environment = EnvironmentConfig(env_class=name) if run is None else run.environment
    refuse_unknown_environments([(place, prompt)], lambda found: look_up_environment(environment, found))
    settings = EnvSettings({**env_config_for(environment, name), **options_from_words(arguments.option)})
    made = TextGame(prompt, env_config=settings)
    _refuse_wrong_row(made, place, arguments.seed)
    if run is not None:
        _play_as_in(run, made)
    return made


def _play_as_in(run: SkyRLConfig, made: PlayedGame) -> None:
    """Let the turns be limited and paid as in the run."""
    from skyrl_train.rollout.rewards import Rewards

    made.max_turns = 1 if run.generator.batched else run.generator.max_turns
    made.rewards = Rewards.of(run.environment.reward, run.environment.named_rewards)


def _refuse_wrong_row(made: TextGame, place: str, seed: int) -> None:
    """Raise ValueError if the environment cannot be made from the row: no model need be loaded to learn that."""
    name, extras = made.prompt.env_class, {"seed": seed, "max_turns": 1, **made.prompt.env_extras}
    tried = Outcome.of(lambda: made.make(name, copy.deepcopy(extras)))
    if tried.error is not None:
        hint = "" if place.startswith("row ") else "; give another with --data FILE or --row JSON"
        raise ValueError(f"{name} cannot be made from {place}: {words_of(tried.error)}{hint}") from tried.error


def _row(arguments: argparse.Namespace, of_run: list[PlacedRow], column: str) -> PlacedRow:
    """Return the row that is played, and its place for messages: the seed says which of them."""
    from skyrl_train.prompts import read_source

    if arguments.row is not None:
        rows = [("--row", gym_commands.row_of(arguments.row))]
    elif arguments.data is not None:
        if not Path(arguments.data).expanduser().is_file():
            raise ValueError(f"--data={arguments.data}: there is no such file")
        rows = list(read_source(arguments.data))
    elif of_run:
        return _pick(of_run, arguments.seed)
    else:
        examples = example_extras(arguments.env)
        rows = [("an example row of the environment", row) for row in examples] or [("an empty row", {})]
    place, row = _pick(rows, arguments.seed)
    if column not in row and arguments.data is not None:
        raise ValueError(f"{place} has no column {column!r}; it has {', '.join(row)}; --prompt-column names another")
    return place, {column: BEGIN, **row}


def _pick(rows: list[PlacedRow], seed: int) -> PlacedRow:
    if not rows:
        raise ValueError("there are no rows to play; give one with --data FILE or --row JSON")
    return rows[seed % len(rows)]
