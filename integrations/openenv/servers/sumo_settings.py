"""Settings of a simulation in sumo_rl_env, checked before SUMO reads them, and the networks bundled with sumo-rl."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from integrations.openenv.catalog.options import read_options

REWARD_FNS = ("diff-waiting-time", "average-speed", "queue", "pressure")
BEGIN = re.compile(r'<begin value="(\d+)"')  # in a .sumocfg
MAX_SEED = 2**31 - 1
# The official image's environment variables; they are the defaults of reset's options.
VARIABLES = {
    "SUMO_NET_FILE": "network",
    "SUMO_ROUTE_FILE": "route_file",
    "SUMO_NUM_SECONDS": "num_seconds",
    "SUMO_DELTA_TIME": "delta_time",
    "SUMO_YELLOW_TIME": "yellow_time",
    "SUMO_MIN_GREEN": "min_green",
    "SUMO_MAX_GREEN": "max_green",
    "SUMO_REWARD_FN": "reward_fn",
    "SUMO_SEED": "sumo_seed",
}


@dataclass(frozen=True, slots=True)
class SumoSettings:
    """Options of reset. The first nine and their defaults are the official environment's."""

    network: str = "single-intersection"  # a bundled network, or the path of a .net.xml
    route_file: str = ""  # a .rou.xml in the network's folder, or a path; empty: the folder's first
    num_seconds: int = 20_000  # simulated for the agent, after the warm-up
    delta_time: int = 5  # seconds from one action to the next
    yellow_time: int = 2
    min_green: int = 5  # a change within this plus yellow_time of the last one is ignored
    max_green: int = 50  # only shown in the state: sumo-rl ignores it
    reward_fn: str = "diff-waiting-time"
    sumo_seed: int = 42  # without a seed at reset
    begin_time: int | None = None  # time of day, in seconds; None: what the network's .sumocfg says, else 0
    traffic_light: str = ""  # the agent's; empty: the first. Others run the network's own program
    warmup_seconds: int = 0  # before the agent's first turn, with the light on a phase that the seed draws
    shuffle_flows: bool = False  # permute the rates of the route file's flows by the seed

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_seconds", self.num_seconds, 1),
            ("yellow_time", self.yellow_time, 1),
            ("delta_time", self.delta_time, self.yellow_time + 1),
            ("min_green", self.min_green, 0),
            ("warmup_seconds", self.warmup_seconds, 0),
        ):
            if not least <= value <= 1_000_000:
                raise ValueError(f"{name}={value} must be {least} to 1000000")
        if self.reward_fn not in REWARD_FNS:
            raise ValueError(f"reward_fn={self.reward_fn!r} must be one of {', '.join(REWARD_FNS)}")
        if not 0 <= self.sumo_seed <= MAX_SEED:
            raise ValueError(f"seed={self.sumo_seed} must be 0 to {MAX_SEED}")
        if not self.net_path.is_file():
            raise ValueError(
                f"network={self.network!r} is neither a file nor a bundled network: {', '.join(bundled_networks())}"
            )
        if not self.route_path.is_file():
            raise ValueError(
                f"route_file={self.route_file!r} is no file, and none of the network's own: {', '.join(self.routes)}"
            )

    @property
    def net_path(self) -> Path:
        return bundled_networks().get(self.network) or Path(self.network).expanduser()

    @property
    def routes(self) -> list[str]:
        """The names of the route files in the network's folder."""
        return sorted(path.name for path in self.net_path.parent.glob("*.rou.xml"))

    @property
    def route_path(self) -> Path:
        if self.route_file in self.routes or not self.route_file:
            return self.net_path.parent / (self.route_file or next(iter(self.routes), "no route file"))
        return Path(self.route_file).expanduser()

    @property
    def first_second(self) -> int:
        if self.begin_time is not None:
            return self.begin_time
        told = [BEGIN.search(path.read_text()) for path in sorted(self.net_path.parent.glob("*.sumocfg"))]
        return next((int(match.group(1)) for match in told if match), 0)


def read_settings(options: Mapping[str, Any]) -> SumoSettings:
    """Return settings from these options, else environment variables, else defaults; ValueError says what is wrong."""
    from_environment = {name: os.environ[variable] for variable, name in VARIABLES.items() if os.environ.get(variable)}
    return read_options(SumoSettings, {**from_environment, **options}, "sumo_rl_env")


@cache
def bundled_networks() -> dict[str, Path]:
    """Return the networks inside sumo-rl that have traffic and traffic lights, by the names of their folders."""
    found = importlib.util.find_spec("sumo_rl")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("sumo_rl_env needs sumo-rl and libsumo: uv sync --extra sumo-rl-env")
    root = Path(found.submodule_search_locations[0]) / "nets"
    networks = [
        path
        for path in sorted(root.rglob("*.net.xml"))
        if any(path.parent.glob("*.rou.xml")) and "<tlLogic" in path.read_text()
    ]
    folders = [path.parent for path in networks]
    return {
        path.parent.name if folders.count(path.parent) == 1 else path.name.removesuffix(".net.xml"): path
        for path in networks
    }
