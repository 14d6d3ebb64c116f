"""A server with faults, as other authors may write one; served as `tests.integrations.openenv.troubled:app`."""

from __future__ import annotations

import os
from typing import Any

from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

NAME = f"{__name__}:app"


class SayAction(Action):
    """Say a digit: "0", "1", "2", "3", "4", "5" or "6"."""

    word: str


class SaidObservation(Observation):
    """The answer, which says whether the digit was right."""

    text: str = ""


class TroubledEnvironment(Environment):
    """Guess a digit; fails in the way that the action or the environment variable TROUBLE names."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        if os.environ.get("TROUBLE") == "factory":
            raise FileNotFoundError("/app/env/data/questions.csv is not there")
        self._state = State(episode_id="x", step_count=0)
        self._secret = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> SaidObservation:
        if os.environ.get("TROUBLE") == "seed" and seed is None:
            raise ValueError("seed and size must be provided when dataset_name is specified")
        self._secret = 3 if os.environ.get("TROUBLE") == "one task" else (seed or 0) % 7
        return SaidObservation(text="Guess a digit.")

    def step(self, action: SayAction, timeout_s: float | None = None, **more: Any) -> Any:
        word = action.word
        if word == "die":
            os._exit(3)
        if word == "bug" or os.environ.get("TROUBLE") == "bug":
            return {"observation": None}.model_dump()  # ty: ignore[missing-attribute]
        if word == "answer of a wrong type":
            return SaidObservation(text=7)  # ty: ignore[invalid-argument-type]
        if word == "illegal":
            raise ValueError(f"Illegal move: {word}")
        if word == "missing key":
            return {}[self._secret]
        if word == "unknown key":
            return {}[word]
        if os.environ.get("TROUBLE") == "always":
            raise ValueError("no data set was loaded")
        won = word == str(self._secret)
        return SaidObservation(text="Right." if won else "Wrong.", reward=float(won), done=won)

    @property
    def state(self) -> State:
        return self._state


app = create_app(TroubledEnvironment, SayAction, SaidObservation, max_concurrent_envs=64)
