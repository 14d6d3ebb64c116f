"""The differences between two runs: settings, code, machines, and the main metrics of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from skyrl_train.run.metrics import tokens_per_second
from skyrl_train.run.records.run_info import RunInfo

# Metric -> its name in the table, and whether more of it is better (None: nothing is best).
MAIN: dict[str, tuple[str, bool | None]] = {
    "eval/all/avg_score": ("evaluation", True),
    "reward/avg_raw_reward": ("reward", True),
    "policy/policy_entropy": ("entropy", None),
    "policy/policy_kl": ("KL", None),
    "policy/grad_norm": ("gradient norm", None),
    "generate/avg_num_tokens": ("tokens of an episode", None),
    "generate/env_failures": ("failures", False),
    "timing/step": ("seconds of a step", False),
    "tokens/s": ("tokens per second", True),
}
NOT_COMPARED = ("trainer.ckpt_path", "trainer.export_path", "trainer.run_name")  # two runs always differ in these
Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """differences and settings: name -> [of A, of B]. metrics: name -> "a" and "b" -> first, last, best, median."""

    differences: dict[str, list[Any]] = field(default_factory=dict)
    settings: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


def compare(a: RunInfo, b: RunInfo, lines_a: Lines, lines_b: Lines) -> Comparison:
    facts_a, facts_b = facts(a, lines_a), facts(b, lines_b)
    names = dict.fromkeys([*facts_a, *facts_b])
    return Comparison(
        differences={n: [facts_a.get(n), facts_b.get(n)] for n in names if facts_a.get(n) != facts_b.get(n)},
        settings=changed_between(a, b),
        metrics={
            title: {"a": course(lines_a, key, best), "b": course(lines_b, key, best)}
            for key, (title, best) in MAIN.items()
            if any(_values(lines, key) for lines in (lines_a, lines_b))
        },
    )


def facts(info: RunInfo, lines: Lines) -> dict[str, Any]:
    """Return what a run ran on, from its newest start, in a flat form."""
    last = info.starts[-1] if info.starts else {}
    plain: dict[str, Any] = {"model": info.model_name, "environment": info.environment, "device": info.device}
    plain |= {"steps": max((int(line["step"]) for line in lines), default=0), "machine": last.get("machine")}
    commits = {f"commit {name}": value for name, value in (last.get("commits") or {}).items()}
    return plain | commits | dict(last.get("versions") or {})


def changed_between(a: RunInfo, b: RunInfo) -> dict[str, list[Any]]:
    """Return the settings in which two runs differ; a setting that one left alone has its default there."""
    found = {}
    for key in sorted(a.changed.keys() | b.changed.keys()):
        default = (a.changed.get(key) or b.changed[key])[1]
        values = [info.changed[key][0] if key in info.changed else default for info in (a, b)]
        if values[0] != values[1] and key not in NOT_COMPARED:
            found[key] = values
    return found


def course(lines: Lines, key: str, more_is_better: bool | None) -> dict[str, float]:
    """Return first, last, median and best of a metric; {} for one that the run did not log."""
    values = _values(lines, key)
    if not values:
        return {}
    found = {"first": values[0], "last": values[-1], "median": median(values)}
    return found if more_is_better is None else found | {"best": (max if more_is_better else min)(values)}


def _values(lines: Lines, key: str) -> list[float]:
    if key == "tokens/s":
        return [speed for line in lines if (speed := tokens_per_second(dict(line))) is not None]
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]
