"""The traffic light environment's server: an agent chooses the green phase of one light, SUMO moves the vehicles.

It has the official image's wire format, rewards and end of episode, and its environment variables set the defaults. In
addition, reset takes a seed and the options of SumoSettings and returns the names of the phases, each session has its
own simulation, and a step after the end repeats the last observation with reward 0.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from pydantic import Field

from integrations.openenv.servers.serving import serve
from integrations.openenv.servers.sumo_settings import SumoSettings, read_settings
from skyrl_gym.walls.nursery import Nursery, Worker

WORKER_MODULE = "integrations.openenv.servers.sumo_worker"
START_TIMEOUT_S, STEP_TIMEOUT_S = 60.0, 25.0  # a step of the bundled networks takes milliseconds


class SumoAction(Action):
    """The phase that gets green. ts_id is for the official client and ignored: a session has one light."""

    phase_id: int
    ts_id: str = "0"


class SumoObservation(Observation):
    """One-hot phase, whether it may change, then density and queue of each lane as fractions of its capacity.

    junction, which the official image does not have, comes with reset: the names of the phases (see sumo_junction.py).
    It is a field and not metadata, because openenv before 0.4 sends no metadata.
    """

    observation: list[float]
    observation_shape: list[int] = Field(default_factory=list)
    action_mask: list[int] = Field(default_factory=list)
    sim_time: float = 0.0
    junction: dict[str, Any] | None = None


class SumoState(State):
    """OpenEnv's common state, the settings, and the traffic in the whole network. Times in s, speed in m/s."""

    net_file: str = ""
    route_file: str = ""
    num_seconds: int = 20_000
    delta_time: int = 5
    yellow_time: int = 2
    min_green: int = 5
    max_green: int = 50
    reward_fn: str = "diff-waiting-time"
    sim_time: float = 0.0
    total_vehicles: int = 0
    total_waiting_time: float = 0.0
    mean_waiting_time: float = 0.0
    mean_speed: float = 0.0


class SumoRlEnvironment(Environment[SumoAction, SumoObservation, SumoState]):
    """One session, with a new worker process for each episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, nursery: Nursery) -> None:
        super().__init__()
        self._nursery = nursery
        self._worker: Worker | None = None
        self._last: SumoObservation | None = None
        self._state = SumoState(episode_id=str(uuid.uuid4()))

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> SumoObservation:
        self.close()
        settings = read_settings(options if seed is None else {**options, "sumo_seed": seed})
        self._worker = self._nursery.worker(asdict(settings))
        self._state = _new_state(settings, episode_id)
        seen = self._request(None, START_TIMEOUT_S)
        return self._observation(seen)

    def step(self, action: SumoAction, timeout_s: float | None = None, **kwargs: Any) -> SumoObservation:
        last = self._last
        if last is None:
            raise ValueError("there is no simulation: reset comes first")
        if last.done:
            return last.model_copy(update={"reward": 0.0})
        if action.phase_id not in last.action_mask:
            raise ValueError(f"phase_id={action.phase_id} must be 0 to {len(last.action_mask) - 1}")
        seen = self._request(action.phase_id, STEP_TIMEOUT_S)
        self._state.step_count += 1
        return self._observation(seen)

    def close(self) -> None:
        worker, self._worker, self._last = self._worker, None, None
        if worker is not None:
            worker.close()

    @property
    def state(self) -> SumoState:
        return self._state

    def _request(self, phase: int | None, timeout_s: float) -> dict[str, Any]:
        assert self._worker is not None
        seen = self._worker.ask(phase, timeout_s)
        if seen is None:
            self.close()
            raise RuntimeError(f"the simulation crashed or did not answer within {timeout_s:g} s; reset starts another")
        if "error" in seen:
            self.close()
            raise ValueError(seen["error"])
        return seen

    def _observation(self, seen: dict[str, Any]) -> SumoObservation:
        system = seen["system_info"]
        self._state.sim_time = seen["sim_time"]
        self._state.total_vehicles = seen["num_vehicles"]
        self._state.total_waiting_time = system["system_total_waiting_time"]
        self._state.mean_waiting_time = system["system_mean_waiting_time"]
        self._state.mean_speed = system["system_mean_speed"]
        self._last = SumoObservation(
            observation=seen["observation"],
            observation_shape=[len(seen["observation"])],
            action_mask=list(range(seen["num_phases"])),
            sim_time=seen["sim_time"],
            junction=seen.get("junction"),
            reward=seen["reward"],
            done=seen["done"],
            metadata={"num_green_phases": seen["num_phases"], "system_info": system},
        )
        return self._last


def _new_state(settings: SumoSettings, episode_id: str | None) -> SumoState:
    fields = {name: value for name, value in asdict(settings).items() if name in SumoState.model_fields}
    files = {"net_file": str(settings.net_path), "route_file": str(settings.route_path)}
    return SumoState(episode_id=episode_id or str(uuid.uuid4()), **{**fields, **files})


def make_app(max_sessions: int) -> FastAPI:
    read_settings({})  # reports wrong environment variables before anybody connects
    nursery = Nursery(WORKER_MODULE)

    def make_environment() -> SumoRlEnvironment:
        return SumoRlEnvironment(nursery)

    return create_app(
        make_environment, SumoAction, SumoObservation, env_name="sumo_rl_env", max_concurrent_envs=max_sessions
    )


if __name__ == "__main__":
    serve(make_app, "The traffic light environment of OpenEnv, without Docker.")
