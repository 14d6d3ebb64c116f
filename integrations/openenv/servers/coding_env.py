"""The coding environment's server: it runs small Python programs and returns their output.

It has the official image's wire format and reward. That reward depends on the text of the program only, not on what it
does: -1 for a forbidden pattern, +0.1 for being short, -0.2 for not being Python.
"""

from __future__ import annotations

import ast
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from openenv.core.env_server.types import EnvironmentMetadata

from integrations.openenv.servers.programs import WORKER_MODULE, ProgramSession
from integrations.openenv.servers.serving import serve
from skyrl_gym.walls.memory import memory_of_programs
from skyrl_gym.walls.nursery import Nursery
from skyrl_gym.walls.wall import NoWall, Wall, accepted_wall

FORBIDDEN = re.compile(r"import\s+os|import\s+subprocess|eval\(|exec\(|__import__|open\(")
FORBIDDEN_REWARD, SHORT_REWARD, NOT_PYTHON_REWARD = -1.0, 0.1, -0.2
SHORT_CHARS = 100
SERVERS = Path(__file__).parent


class CodeAction(Action):
    """A program to run. Its variables are kept for the next one."""

    code: str


class CodeObservation(Observation):
    """The program's output, or its error."""

    stdout: str = ""
    stderr: str = ""
    exit_code: int = 0


class CodeState(State):
    """OpenEnv's common state and the exit code of the last program."""

    last_exit_code: int = 0


class CodingEnvironment(Environment[CodeAction, CodeObservation, CodeState]):
    """One session, whose interpreter runs in its own worker process."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, nursery: Nursery, wall: Wall) -> None:
        super().__init__()
        self._wall = wall
        self._session = ProgramSession(nursery)
        self._state = CodeState(episode_id=str(uuid.uuid4()))

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> CodeObservation:
        self._session.reset(seed)
        self._state = CodeState(episode_id=episode_id or str(uuid.uuid4()))
        return CodeObservation(reward=0.0)

    def step(self, action: CodeAction, timeout_s: float | None = None, **kwargs: Any) -> CodeObservation:
        outcome = self._session.run(action.code)
        self._state.step_count += 1
        self._state.last_exit_code = outcome.exit_code
        return CodeObservation(
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            exit_code=outcome.exit_code,
            reward=official_reward(action.code),
        )

    def close(self) -> None:
        self._session.close()

    def get_metadata(self) -> EnvironmentMetadata:
        return EnvironmentMetadata(
            name="coding_env", description=f"Runs Python programs, behind this wall: {self._wall}", version="1.0.0"
        )

    @property
    def state(self) -> CodeState:
        return self._state


def official_reward(code: str) -> float:
    """Return the official environment's reward, which does not depend on the result: 0.1 for `1/0` too."""
    reward = FORBIDDEN_REWARD if FORBIDDEN.search(code) else 0.0
    if len(code.strip()) <= SHORT_CHARS:
        reward += SHORT_REWARD
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        reward += NOT_PYTHON_REWARD
    return reward


def make_app(max_sessions: int) -> FastAPI:
    try:
        wall = accepted_wall((SERVERS,))
    except NoWall as refusal:
        raise SystemExit(f"coding_env does not start: {refusal}") from None
    print(f"coding_env: programs run behind this wall: {wall}", file=sys.stderr, flush=True)
    nursery = Nursery(WORKER_MODULE, wall.interpreter, memory_of_programs())

    def make_environment() -> CodingEnvironment:
        return CodingEnvironment(nursery, wall)

    return create_app(
        make_environment, CodeAction, CodeObservation, env_name="coding_env", max_concurrent_envs=max_sessions
    )


if __name__ == "__main__":
    serve(make_app, "The coding environment of OpenEnv, without Docker.")
