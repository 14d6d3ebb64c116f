"""The episodes that a report shows of its first and its last step: best, typical, worst and most changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.run.records.trajectories import iterate_trajectories
from skyrl_train.types import EpisodeEnd

LABELS = ("best", "typical", "worst", "most changed")


@dataclass(frozen=True)
class Picked:
    """An episode with what it stands for; one that is best and typical at once is shown once."""

    labels: list[str]
    is_late: bool  # of the last step, where there are two
    step: int
    episode: EpisodeRecord


@dataclass(frozen=True)
class _Row:
    """The part of an episode that is needed to choose it. place: in its file."""

    place: int
    reward: float
    uid: str
    is_broken: bool


def pick_episodes(files: dict[int, Path]) -> tuple[list[Picked], list[tuple[int, ValueError]]]:
    """Return the chosen episodes, early before late under each label, and the steps whose file is damaged."""
    rows: dict[int, list[_Row]] = {}
    damaged = []
    for step in dict.fromkeys((min(files), max(files))) if files else ():
        try:
            if found := _usable(iterate_trajectories(files[step])):
                rows[step] = found
        except ValueError as error:
            damaged.append((step, error))
    chosen = {step: best_typical_worst(found) for step, found in rows.items()}
    if len(rows) == 2:
        for step, place in zip(rows, _most_changed(*rows.values()), strict=True):
            if place is not None:
                chosen[step]["most changed"] = place
    picked = [one for step, places in chosen.items() for one in _read(files[step], step, places, step != min(rows))]
    return sorted(picked, key=lambda one: (LABELS.index(one.labels[0]), one.is_late)), damaged


def best_typical_worst(rows: list[_Row]) -> dict[str, int]:
    """Return the places of three episodes by reward, of equal ones the first. Typical is the lower median."""
    ordered = sorted(rows, key=lambda row: (row.reward, -row.place))
    middle = ordered[(len(ordered) - 1) // 2]
    return {"best": ordered[-1].place, "typical": middle.place, "worst": ordered[0].place}


def _usable(episodes: Iterable[EpisodeRecord]) -> list[_Row]:
    """Return a row per episode. Those that their environments broke are left out, unless all of them broke."""
    rows = [_Row(i, e.reward, e.uid, e.end is EpisodeEnd.ENV_FAILURE) for i, e in enumerate(episodes)]
    return [row for row in rows if not row.is_broken] or rows


def _most_changed(early: list[_Row], late: list[_Row]) -> tuple[int | None, int | None]:
    """Return an early and a late episode of the prompt whose mean reward changed the most; None if none did."""
    before, after = _by_prompt(early), _by_prompt(late)
    changes = {uid: abs(_mean(after[uid]) - _mean(before[uid])) for uid in before if uid in after}
    uid = max(changes, key=lambda name: changes[name], default="")
    if not changes.get(uid):
        return None, None
    return _nearest_to_mean(before[uid]), _nearest_to_mean(after[uid])


def _by_prompt(rows: list[_Row]) -> dict[str, list[_Row]]:
    found: dict[str, list[_Row]] = {}
    for row in rows:
        found.setdefault(row.uid, []).append(row)
    return found


def _mean(rows: list[_Row]) -> float:
    return sum(row.reward for row in rows) / len(rows)


def _nearest_to_mean(rows: list[_Row]) -> int:
    mean = _mean(rows)
    return min(rows, key=lambda row: (abs(row.reward - mean), row.place)).place


def _read(path: Path, step: int, places: dict[str, int], is_late: bool) -> list[Picked]:
    wanted = {i: e for i, e in enumerate(iterate_trajectories(path)) if i in places.values()}
    labels: dict[int, list[str]] = {}
    for label in LABELS:
        if label in places:
            labels.setdefault(places[label], []).append(label)
    return [Picked(names, is_late, step, wanted[place]) for place, names in labels.items()]
