"""The report of a benchmark: medians, ratios, the fraction of the machine's upper bound, and one line of JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of one benchmark.

    `unit` is of a rate (more is better) unless `is_time`; ratios above 1 favour ours.
    """

    what: str
    unit: str
    ours: float
    peers: Mapping[str, float]
    ceiling: float | None = None  # the best this machine could do
    is_time: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)  # whatever else was measured

    @property
    def ratios(self) -> dict[str, float]:
        return {name: peer / self.ours if self.is_time else self.ours / peer for name, peer in self.peers.items()}

    @property
    def share(self) -> float | None:
        """The fraction of the machine's upper bound that ours reaches; None without an upper bound."""
        if self.ceiling is None:
            return None
        return self.ceiling / self.ours if self.is_time else self.ours / self.ceiling

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "peers": dict(self.peers),
            "ratio": self.ratios,
            "ceiling": self.ceiling,
            "share_of_ceiling": self.share,
            **self.facts,
            "machine": machine(),
        }

    def print(self, as_json: bool) -> None:
        """Print a table, unless `as_json`, and then JSON in the last line."""
        if not as_json:
            print(f"{self.what} [{self.unit}], on {machine()}")
            share = "" if self.share is None else f"   {self.share:.0%} of the ceiling"
            print(f"  {'ours':<14}{self.ours:>10.2f}{share}")
            for name, value in self.peers.items():
                better = "faster" if self.is_time else "as much"
                print(f"  {name:<14}{value:>10.2f}   ours is {self.ratios[name]:.2f} times {better}")
            if self.ceiling is not None:
                print(f"  {'ceiling':<14}{self.ceiling:>10.2f}")
            for name, value in self.facts.items():
                print(f"  {name}: {json.dumps(value)}")
        print(json.dumps(self.as_dict()))


def medians(results: Mapping[str, Sequence[Mapping[str, Any]]], number: Callable[[Any], float]) -> dict[str, float]:
    """Return the median of a number over each worker's results."""
    return {name: median(map(number, rows)) for name, rows in results.items()}


def machine() -> str:
    """Return a line with the name of the GPU or CPU, whether it has AMX, the cores, and torch's version."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{model}{amx}, {os.cpu_count()} cores, torch {torch.__version__}"
