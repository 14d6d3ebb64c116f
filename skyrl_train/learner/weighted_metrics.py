"""Metrics of the pieces of an update, merged into one number each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class WeightedMetrics:
    """Metrics of some pieces, each with its weight: the number of tokens (or of steps) that it stands for.

    Pieces are added up only once, in `means`, in the order in which they were measured. So it does not matter, to the
    last bit, in which portions they were merged.
    """

    pieces: tuple[tuple[Mapping[str, float], float], ...] = ()

    @staticmethod
    def of(metrics: Mapping[str, float], weight: float) -> WeightedMetrics:
        return WeightedMetrics(((metrics, weight),))

    @staticmethod
    def merged(*parts: WeightedMetrics) -> WeightedMetrics:
        """Return the pieces of all parts, in their order."""
        return WeightedMetrics(tuple(chain.from_iterable(part.pieces for part in parts)))

    def means(self) -> dict[str, float]:
        """Return sum(weight * value) / sum(weight) for each name; names ending in _max or _min keep the extreme.

        Names that never had any weight are left out.
        """
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for metrics, weight in self.pieces:
            for name, value in metrics.items():
                if name.endswith(("_max", "_min")):
                    extreme = max if name.endswith("_max") else min
                    sums[name], weights[name] = extreme(value, sums.get(name, value)), 1.0
                else:
                    sums[name] = sums.get(name, 0.0) + value * weight
                    weights[name] = weights.get(name, 0.0) + weight
        return {name: total / weights[name] for name, total in sums.items() if weights[name]}
