"""sumo_rl_env: one traffic light. Each turn the model names the road that gets green, and SUMO moves the vehicles.

    Green: north. Waiting: west 14, north 2.     longest queue first, in vehicles
    <action>west</action>                        or the phase's number

Rewards, by the option shaped_reward:
  True (default)  a turn earns (1 - 3 x the fraction of the lanes' capacity that waiting vehicles take at its end) /
                  turns, at least 0: an episode earns 0 to 1, and waiting costs in the turn in which it happens.
  False           the server's reward. For diff-waiting-time, the official default, that is the decrease within the turn
                  of the waiting time of all vehicles before the light, in hundreds of seconds; an episode's sum is
                  the difference between its start and its end, whatever happened between.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, ClassVar, Literal, Self

from integrations.openenv.catalog.entry import Answer, CatalogEntry, InvalidAction, Messages, Task, Translator, paid
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.client.session import StepResult

INSTRUCTION = (
    "You control a traffic light. Answer with the road that gets green, as <action>road</action>. "
    "Keep the queues short."
)
STEEPNESS = 3.0  # the shaped reward is 0 if waiting vehicles take a third of the lanes
LOW_WAITING = 0.1  # mean fraction of the lanes with waiting vehicles below which the task counts as solved
HYSTERESIS = 2.0  # vehicles; the gold player changes only for more than these: a change costs the yellow time
LANE_ROOM = 20.0  # vehicles that fit on a lane of unknown length


@dataclass(frozen=True, slots=True)
class SumoAction:
    """An action: the phase that gets green. The official environment has one light and accepts any ts_id."""

    phase_id: int
    ts_id: str = "0"

    def fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SumoObservation:
    """An observation. Densities and queues are per lane, as fractions of the vehicles that fit on it."""

    phase: int  # the phase that has green
    num_phases: int
    may_change: bool  # False: it is too early, and a change would be ignored
    densities: list[float]
    queues: list[float]  # of standing vehicles
    sim_time: float  # s

    @classmethod
    def from_fields(cls, observation: dict[str, Any]) -> Self:
        mask, time = observation.get("action_mask"), observation.get("sim_time")
        numbers = _numbers(observation.get("observation"), "observation")
        [sim_time] = _numbers([time], "sim_time")
        if not isinstance(mask, list) or mask != list(range(len(mask))) or not mask:
            raise OpenEnvError(f"sumo_rl_env: action_mask={str(mask)[:100]} does not number the phases")
        num_phases = len(mask)
        one_hot, rest = numbers[:num_phases], numbers[num_phases + 1 :]
        if len(rest) < 2 or len(rest) % 2 or sorted(one_hot) != [0.0] * (num_phases - 1) + [1.0]:
            raise OpenEnvError(f"sumo_rl_env: {len(numbers)} numbers do not describe a light of {num_phases} phases")
        num_lanes = len(rest) // 2
        return cls(
            one_hot.index(1.0), num_phases, bool(numbers[num_phases]), rest[:num_lanes], rest[num_lanes:], sim_time
        )


@dataclass(frozen=True, slots=True)
class SumoOptions:
    """The simulation and its reward. The fields from network to shuffle_flows are options of our server's reset."""

    network: str = (
        "single-intersection"  # a network that sumo-rl brings (a wrong name lists them), or a .net.xml's path
    )
    route_file: str = ""  # a .rou.xml of the network's folder, or a path; empty: the folder's first
    traffic_light: str = ""  # the one to control, in a network that has several; empty: the first
    num_seconds: int = 120  # the horizon
    delta_time: int = 15  # seconds per action
    yellow_time: int = 2  # between two greens
    min_green: int = 5  # seconds for which a phase stays
    reward_fn: Literal["diff-waiting-time", "average-speed", "queue", "pressure"] = "diff-waiting-time"
    warmup_seconds: int = 45  # before the first turn, while the light stays on a phase that the seed draws
    shuffle_flows: bool = True  # which approach has the heavy traffic is drawn by the seed
    shaped_reward: bool = True  # False: the server's reward

    def __post_init__(self) -> None:
        if not self.yellow_time < self.delta_time <= self.num_seconds:
            raise ValueError(
                f"yellow_time={self.yellow_time} < delta_time={self.delta_time} <= num_seconds={self.num_seconds} "
                "must hold"
            )
        for name in ("yellow_time", "min_green", "warmup_seconds"):
            if getattr(self, name) < (name == "yellow_time"):
                raise ValueError(f"{name}={getattr(self, name)} is too little")

    @property
    def num_turns(self) -> int:
        return math.ceil(self.num_seconds / self.delta_time)


@dataclass(frozen=True, slots=True)
class Junction:
    """The phases of a traffic light: their names, and the lanes that each gives green."""

    phases: list[str]
    phase_lanes: list[list[int]]  # lanes that each phase gives green
    lane_room: list[float]  # vehicles that fit on each lane
    is_known: bool = True

    @classmethod
    def from_result(cls, first: StepResult, seen: SumoObservation) -> Self:
        """Return the junction that our server describes.

        The official image describes none: its own network is known here, and of others only the numbers of phases
        and lanes.
        """
        told = first.observation.get("junction")
        if told is not None:
            return cls._from_fields(told, seen)
        if (seen.num_phases, len(seen.queues)) == (2, 4):
            return cls(["north", "west"], [[0, 1], [2, 3]], [19.8, 19.8, 18.9, 18.9])
        numbered = [f"phase {phase}" for phase in range(seen.num_phases)]
        return cls(numbered, [[] for _ in numbered], [LANE_ROOM] * len(seen.queues), is_known=False)

    @classmethod
    def _from_fields(cls, told: object, seen: SumoObservation) -> Self:
        match told:
            case {"phases": list(phases), "phase_lanes": list(phase_lanes), "lane_room": list(lane_room)} if (
                len(phases) == len(phase_lanes) == seen.num_phases
                and len(lane_room) == len(seen.queues)
                and all(isinstance(name, str) for name in phases)
                and all(isinstance(lanes, list) for lanes in phase_lanes)
                and all(lane in range(len(lane_room)) for lanes in phase_lanes for lane in lanes)
            ):
                return cls(phases, phase_lanes, _numbers(lane_room, "lane_room"))
        raise OpenEnvError(f"sumo_rl_env: junction does not fit the observation: {str(told)[:200]}")

    def waiting(self, seen: SumoObservation) -> list[float]:
        """Return how many vehicles wait for each phase."""
        return [sum(seen.queues[lane] * self.lane_room[lane] for lane in lanes) for lanes in self.phase_lanes]

    def text(self, seen: SumoObservation) -> str:
        green = f"Green: {self.phases[seen.phase]}{'' if seen.may_change else ' (cannot change yet)'}."
        if not self.is_known:
            return f"{green} Waiting by lane, in % of its room: {', '.join(f'{queue:.0%}' for queue in seen.queues)}."
        waiting = self.waiting(seen)
        longest_first = sorted(range(seen.num_phases), key=lambda phase: -waiting[phase])
        return f"{green} Waiting: {', '.join(f'{self.phases[phase]} {waiting[phase]:.0f}' for phase in longest_first)}."


class SumoEntry(CatalogEntry):
    """One traffic light with the traffic of a real simulator."""

    name: ClassVar[str] = "sumo_rl_env"
    image: ClassVar[str] = "ghcr.io/meta-pytorch/openenv-sumo-rl-env:latest"
    server_module: ClassVar[str] = "integrations.openenv.servers.sumo_rl_env"
    extra: ClassVar[str | None] = "sumo-rl-env"
    engine_module: ClassVar[str | None] = "sumo_rl"
    max_turns: ClassVar[int] = SumoOptions().num_turns
    options_type: ClassVar[type] = SumoOptions

    def tasks(self, random: Random, num_tasks: int, options: SumoOptions) -> list[Task]:
        """Return tasks that are all equal: the seed of a row makes its traffic."""
        return [Task(_prompt(), family=options.network) for _ in range(num_tasks)]

    def translator(self, task: Task, options: SumoOptions) -> SumoTranslator:
        return SumoTranslator(options)

    def reset_kwargs(self, options: SumoOptions) -> dict[str, Any]:
        return {name: value for name, value in asdict(options).items() if name != "shaped_reward"}

    def image_variables(self, options: SumoOptions) -> dict[str, str]:
        """Return the official image's settings.

        It has no seed and no warm-up, and its networks are paths in the image.
        """
        variables = {
            "SUMO_NUM_SECONDS": str(options.num_seconds),
            "SUMO_DELTA_TIME": str(options.delta_time),
            "SUMO_YELLOW_TIME": str(options.yellow_time),
            "SUMO_MIN_GREEN": str(options.min_green),
            "SUMO_REWARD_FN": options.reward_fn,
        }
        if options.network != SumoOptions().network:
            variables["SUMO_NET_FILE"] = options.network
        if options.route_file:
            variables["SUMO_ROUTE_FILE"] = options.route_file
        return variables

    def fewest_turns(self, options: SumoOptions) -> int:
        """Return 1 for the shaped reward, which each turn pays; the server's needs a whole episode to mean anything."""
        return 1 if options.shaped_reward else options.num_turns


class SumoTranslator(Translator):
    def __init__(self, options: SumoOptions) -> None:
        self.options = options
        self.gold_reward = _gold_reward(options)
        self.num_steps = 0
        self.score = 0.0  # the shaped reward so far
        self.sum_waiting = 0.0  # of the fractions of the lanes, over the turns
        self.sum_vehicles = 0.0

    def first_text(self, first: StepResult) -> str:
        self.seen = SumoObservation.from_fields(first.observation)
        self.junction = Junction.from_result(first, self.seen)
        return self.junction.text(self.seen)

    def action(self, text: str) -> dict[str, Any]:
        phase = self._phases_by_name().get(" ".join(text.lower().replace("-", " ").split()).rstrip(".!"))
        if phase is None:
            names = ", ".join(self.junction.phases)
            raise InvalidAction(f"There is no {_short(text)!r} here. Write one of: {names}.")
        return SumoAction(phase).fields()

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        seen = SumoObservation.from_fields(result.observation)
        if (seen.num_phases, len(seen.queues)) != (self.seen.num_phases, len(self.seen.queues)):
            raise OpenEnvError("sumo_rl_env: the observation's form changed within an episode")
        self.seen = seen
        shaped = self._shaped_reward()
        self.success = result.done and self.sum_waiting <= LOW_WAITING * self.num_steps
        reward = shaped if self.options.shaped_reward else paid(result, "sumo_rl_env")
        return Answer("" if result.done else self.junction.text(seen), reward, result.done)

    def unfinished_reward(self) -> float:
        """Return the most that the missing turns can cost: every lane full of waiting vehicles."""
        if self.options.shaped_reward or self.options.reward_fn == "average-speed":
            return 0.0  # no turn costs anything
        vehicles = sum(self.junction.lane_room)
        turns = self.options.num_turns - self.num_steps
        seconds = self.options.delta_time / 100 if self.options.reward_fn == "diff-waiting-time" else 1.0
        return -turns * vehicles * seconds

    def gold_action(self) -> str | None:
        """Return the phase with the longest queue if it exceeds the green phase's by HYSTERESIS, else the green one."""
        if not self.junction.is_known:
            return None
        waiting = self.junction.waiting(self.seen)
        longest = max(range(len(waiting)), key=waiting.__getitem__)
        change = waiting[longest] > waiting[self.seen.phase] + HYSTERESIS
        return self.junction.phases[longest if change else self.seen.phase]

    def metrics(self) -> dict[str, float]:
        return {"score": self.score, "mean_waiting": self.sum_vehicles / max(self.num_steps, 1)}

    def _shaped_reward(self) -> float:
        """Return the shaped reward of this turn, and add the turn to the sums for the metrics."""
        taken = sum(self.seen.queues) / len(self.seen.queues)
        reward = max(0.0, 1.0 - STEEPNESS * taken) / self.options.num_turns
        self.num_steps += 1
        self.score += reward
        self.sum_waiting += taken
        self.sum_vehicles += sum(q * room for q, room in zip(self.seen.queues, self.junction.lane_room, strict=True))
        return reward

    def _phases_by_name(self) -> dict[str, int]:
        names: dict[str, int] = {}
        for phase, name in enumerate(self.junction.phases):
            names |= {str(phase): phase, f"phase {phase}": phase, name.lower().replace("-", " "): phase}
        return names


def _gold_reward(options: SumoOptions) -> float | None:
    """Return a reward below the lowest of 400 seeds (0.56; -0.98); None unless the simulation is the default one."""
    as_default = SumoOptions(reward_fn=options.reward_fn, shaped_reward=options.shaped_reward)
    if options != as_default:
        return None
    if options.shaped_reward:
        return 0.5
    return -1.5 if options.reward_fn == "diff-waiting-time" else None


def _prompt() -> Messages:
    """Return the prompt: the task and one example turn.

    Measured with SmolLM2-135M-Instruct: greedily every reply is an action, and nearly always the road that is green
    already (0.28 of the shaped reward); at temperature 1 a third of the replies are actions (0.13). An example in which
    the light changes starts at 0.7, for the longest queue is named first and gets copied.
    """
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": "Green: east. Waiting: east 9, south 4."},
        {"role": "assistant", "content": "<action>east</action>"},
        {"role": "user", "content": "Now this light."},
    ]


def _numbers(values: object, name: str) -> list[float]:
    if isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values):
        return [float(value) for value in values]
    raise OpenEnvError(f"sumo_rl_env: {name}={str(values)[:100]} must hold finite numbers only")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 30 else text[:30] + "..."
