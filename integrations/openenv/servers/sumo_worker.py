"""Worker that runs one simulation, because a process can hold only one of libsumo's. Forked for each episode.

A request is a phase, or null for the first observation; an answer is a dictionary, {"error": ...} if SUMO refused.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

os.environ["SUMO_HOME"] = "libsumo needs none"
os.environ["LIBSUMO_AS_TRACI"] = "quiet"
# pandas would import pyarrow, whose allocator starts a thread, and a process with threads must not fork.
sys.modules.setdefault("pyarrow", None)  # ty: ignore[no-matching-overload]

import traci  # noqa: E402  (libsumo, under this name)
from sumo_rl import SumoEnvironment  # noqa: E402

from integrations.openenv.servers.sumo_junction import junction_of  # noqa: E402
from integrations.openenv.servers.sumo_settings import SumoSettings  # noqa: E402

if not traci.isLibsumo():
    raise ImportError(
        "libsumo cannot be loaded, and without it SUMO would run as another program; it needs system libraries: "
        "apt install libgl1 libx11-6 libxext6 libxrender1 libatomic1"
    )

RATES = ("probability", "vehsPerHour", "period", "number")  # attributes for the number of a flow's vehicles


def make_answer(settings: dict[str, Any]) -> Callable[[int | None], dict[str, Any]]:
    """Return the function that answers requests. settings: the fields of a SumoSettings."""
    simulation: Simulation | None = None

    def answer(phase: int | None) -> dict[str, Any]:
        nonlocal simulation
        try:
            if simulation is None:
                simulation = Simulation(SumoSettings(**settings))
                return simulation.first()
            assert phase is not None
            return simulation.step(phase)
        except (traci.TraCIException, ElementTree.ParseError, ValueError) as refused:
            return {"error": f"SUMO refused: {refused}"}

    return answer


class Simulation:
    """One simulation: sumo-rl's environment, with one traffic light for the agent."""

    def __init__(self, settings: SumoSettings) -> None:
        self.settings = settings
        with tempfile.TemporaryDirectory() as folder:
            self.env = SumoEnvironment(
                net_file=str(settings.net_path),
                route_file=str(_route_file(settings, Path(folder))),
                begin_time=settings.first_second,
                num_seconds=settings.num_seconds,
                delta_time=settings.delta_time,
                yellow_time=settings.yellow_time,
                min_green=settings.min_green,
                max_green=settings.max_green,
                reward_fn=settings.reward_fn,
                sumo_seed=settings.sumo_seed,
                sumo_warnings=False,
                single_agent=True,
                add_per_agent_info=False,
            )
            self._take_light()
            self.observation, self.info = self.env.reset()  # SUMO has the files open now: they may be removed
        self.light = self.env.traffic_signals[self.env.ts_ids[0]]

    def first(self) -> dict[str, Any]:
        """Run the warm-up and return the first observation. The agent's num_seconds count from here."""
        held = Random(self.settings.sumo_seed).randrange(self.light.num_green_phases)
        start = self.env.sim_step
        while self.env.sim_step < start + self.settings.warmup_seconds:
            self.observation, _, _, _, self.info = self.env.step(held)
        self.env.sim_max_time = int(self.env.sim_step) + self.settings.num_seconds
        return {**self._seen(None, False), "junction": junction_of(traci, self.light)}

    def step(self, phase: int) -> dict[str, Any]:
        self.observation, reward, _, out_of_time, self.info = self.env.step(phase)
        return self._seen(float(reward), bool(out_of_time))

    def _seen(self, reward: float | None, done: bool) -> dict[str, Any]:
        """Return the answer with plain JSON values, because sumo-rl's contain NumPy's."""
        return {
            "observation": [float(number) for number in self.observation],
            "num_phases": int(self.light.num_green_phases),
            "sim_time": float(self.env.sim_step),
            "reward": reward,
            "done": done,
            "num_vehicles": int(traci.vehicle.getIDCount()),
            "system_info": {name: float(self.info[name]) for name in self.info if name.startswith("system_")},
        }

    def _take_light(self) -> None:
        """Give the agent one light and hide the others, which SUMO then runs by their own program."""
        lights, wanted = list(self.env.ts_ids), self.settings.traffic_light
        if not lights:
            raise ValueError(f"network={self.settings.network!r} has no traffic light")
        if wanted and wanted not in lights:
            raise ValueError(f"traffic_light={wanted!r} is none of the network's: {', '.join(lights)}")
        self.env.ts_ids = [wanted or lights[0]]
        self.env.observations = dict.fromkeys(self.env.ts_ids)
        self.env.rewards = dict.fromkeys(self.env.ts_ids)


def _route_file(settings: SumoSettings, folder: Path) -> Path:
    """Return the route file; with shuffle_flows a copy in which the seed permutes the rates of the flows.

    Rates of one kind are permuted among the flows that begin at the same time, so the total traffic stays the same.
    """
    if not settings.shuffle_flows:
        return settings.route_path
    routes = ElementTree.parse(settings.route_path)
    alike: dict[tuple[str, str | None], list[ElementTree.Element]] = {}
    for flow in routes.iter("flow"):
        for rate in RATES:
            if rate in flow.attrib:
                alike.setdefault((rate, flow.get("begin")), []).append(flow)
    random = Random(f"flows {settings.sumo_seed}")
    for (rate, _), flows in alike.items():
        permuted = [flow.attrib[rate] for flow in flows]
        random.shuffle(permuted)
        for flow, value in zip(flows, permuted, strict=True):
            flow.set(rate, value)
    shuffled = folder / "shuffled.rou.xml"
    routes.write(shuffled)
    return shuffled
