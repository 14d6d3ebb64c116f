"""Names for the phases of a traffic light, by the sides from which their traffic comes on the network's map."""

from __future__ import annotations

import math
from typing import Any

COMPASS = ("north", "east", "south", "west")  # clockwise
NAMING_ORDER = ("north", "south", "east", "west")
TURNS = {"s": "straight", "l": "left", "L": "left", "r": "right", "R": "right", "t": "turning back"}
VEHICLE_LENGTH, MIN_GAP = 5.0, 2.5  # m, SUMO's defaults; sumo-rl assumes the same gap


def junction_of(sumo: Any, light: Any) -> dict[str, Any]:
    """Return the junction's description.

    phases: their names. phase_lanes: the indices of the lanes that each gives green. lane_room: the vehicles that fit
    on each lane.

    sumo: libsumo, with the simulation running. light: sumo-rl's TrafficSignal, whose order of phases and lanes is the
    observation's.
    """
    lanes: list[str] = list(light.lanes)
    links = [
        (group[0][0], _turn(sumo, *group[0][:2])) if group else None
        for group in sumo.trafficlight.getControlledLinks(light.id)
    ]
    going = [
        [link for link, signal in zip(links, phase.state, strict=False) if link and signal in "Gg"]
        for phase in light.green_phases
    ]
    sides = {lane: _side(sumo.lane.getShape(lane)) for lane in lanes}
    return {
        "phases": phase_names([([sides[lane] for lane, _ in green], [turn for _, turn in green]) for green in going]),
        "phase_lanes": [sorted({lanes.index(lane) for lane, _ in green}) for green in going],
        "lane_room": [sumo.lane.getLength(lane) / (MIN_GAP + VEHICLE_LENGTH) for lane in lanes],
    }


def phase_names(phases: list[tuple[list[str], list[str]]]) -> list[str]:
    """Return distinct names of the phases: by sides, then also by turn if sides are equal, then by number.

    phases: the sides and the turns of the links that are green.
    """
    plain = [_sides(sides) for sides, _ in phases]
    turned = []
    for name, (_, turns) in zip(plain, phases, strict=True):
        only = set(turns)
        turned.append(f"{name} {only.pop()}" if plain.count(name) > 1 and len(only) == 1 else name)
    return [f"{name} {index}" if turned.count(name) > 1 else name for index, name in enumerate(turned)]


def _sides(sides: list[str]) -> str:
    if set(sides) == set(COMPASS):
        return "all sides"
    return "-".join(sorted(set(sides), key=NAMING_ORDER.index)) or "nobody"


def _side(shape: Any) -> str:
    """Return the side from which traffic on a lane comes: opposite to the direction of its last segment."""
    (x0, y0), (x1, y1) = shape[-2], shape[-1]
    degrees = math.degrees(math.atan2(x0 - x1, y0 - y1))  # clockwise from north
    return COMPASS[round(degrees / 90) % 4]


def _turn(sumo: Any, lane: str, next_lane: str) -> str:
    for link in sumo.lane.getLinks(lane):
        if link[0] == next_lane:
            return TURNS.get(link[6], "straight")
    return "straight"
