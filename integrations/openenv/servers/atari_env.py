"""The Atari environment's server: 104 games of the Atari 2600, on ale-py.

It has the official image's wire format, reward and environment variables. In addition, `reset` takes a seed and every
option of `GameOptions`; the same seed, options and actions give the same observations and rewards. A step after the
end of an episode changes nothing: the same observation again, done, reward 0.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import Action, Environment, Observation, State, create_app

from integrations.openenv.catalog.atari_games import GameOptions, ObsType
from integrations.openenv.catalog.options import read_options
from integrations.openenv.servers.serving import serve
from skyrl_gym.walls.nursery import Nursery, Worker

STEP_TIMEOUT_S = 25.0  # a thousand frames take 0.05 s


class AtariAction(Action):
    """An action by its index among the legal ones. The other fields are sent by the official client and ignored."""

    action_id: int
    game_name: str = "pong"
    obs_type: ObsType = "rgb"
    full_action_space: bool = False


class AtariObservation(Observation):
    """The screen or the memory as flat numbers, row by row, with its shape, and the state of the game."""

    screen: list[int]
    screen_shape: list[int]
    legal_actions: list[int]
    lives: int = 0
    episode_frame_number: int = 0
    frame_number: int = 0


class AtariState(State):
    """OpenEnv's common state and the game's options."""

    game_name: str = "pong"
    obs_type: ObsType = "rgb"
    full_action_space: bool = False
    mode: int | None = None
    difficulty: int | None = None
    repeat_action_probability: float = 0.0
    frameskip: int = 4


class AtariEnvironment(Environment[AtariAction, AtariObservation, AtariState]):
    """One session, whose console runs in its own worker process."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, nursery: Nursery, defaults: GameOptions) -> None:
        super().__init__()
        self._nursery = nursery
        self._defaults = defaults
        self._options = defaults
        self._worker: Worker | None = None
        self._state = _state(defaults, None)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> AtariObservation:
        self._options = read_options(GameOptions, {**asdict(self._defaults), **options}, "atari_env")
        if self._worker is None:
            self._worker = self._nursery.worker()
        self._state = _state(self._options, episode_id)
        return self._request({"reset": asdict(self._options), "seed": seed})

    def step(self, action: AtariAction, timeout_s: float | None = None, **kwargs: Any) -> AtariObservation:
        if self._worker is None:
            raise RuntimeError("atari_env: no game is running; reset first")
        observation = self._request({"act": action.action_id})
        self._state.step_count += 1
        return observation

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    @property
    def state(self) -> AtariState:
        return self._state

    def _request(self, request: dict[str, Any]) -> AtariObservation:
        assert self._worker is not None
        answer = self._worker.ask(request, STEP_TIMEOUT_S)
        if answer is None:
            self.close()
            raise RuntimeError(f"atari_env: the emulator of {self._options.game} died; reset begins with a new one")
        if "refused" in answer:
            raise ValueError(f"atari_env: {answer['refused']}")
        truncated = answer.pop("truncated")
        meanings = [f"Action.{name}" for name in self._options.actions]
        metadata = {"game_name": self._options.game, "action_meanings": meanings, "truncated": truncated}
        return AtariObservation(**answer, metadata=metadata)


def options_of(variables: Mapping[str, str]) -> GameOptions:
    """Return the options in the official image's environment variables, with its defaults."""
    values: dict[str, Any] = {
        "game": variables.get("ATARI_GAME", "pong"),
        "obs_type": variables.get("ATARI_OBS_TYPE", "rgb"),
        "full_action_space": variables.get("ATARI_FULL_ACTION_SPACE", "false").lower() == "true",
        "repeat_action_probability": variables.get("ATARI_REPEAT_ACTION_PROB", "0.0"),
        "frameskip": variables.get("ATARI_FRAMESKIP", "4"),
        "mode": variables.get("ATARI_MODE"),
        "difficulty": variables.get("ATARI_DIFFICULTY"),
    }
    return read_options(GameOptions, values, "the environment variables ATARI_*")


def _state(options: GameOptions, episode_id: str | None) -> AtariState:
    return AtariState(
        episode_id=episode_id or str(uuid.uuid4()),
        game_name=options.game,
        obs_type=options.obs_type,
        full_action_space=options.full_action_space,
        mode=options.mode,
        difficulty=options.difficulty,
        repeat_action_probability=options.repeat_action_probability,
        frameskip=options.frameskip,
    )


def make_app(max_sessions: int) -> FastAPI:
    nursery, defaults = Nursery("integrations.openenv.servers.atari_worker"), options_of(os.environ)

    def make_environment() -> AtariEnvironment:
        return AtariEnvironment(nursery, defaults)

    return create_app(
        make_environment, AtariAction, AtariObservation, env_name="atari_env", max_concurrent_envs=max_sessions
    )


if __name__ == "__main__":
    serve(make_app, "The Atari environment of OpenEnv, without Docker.")
