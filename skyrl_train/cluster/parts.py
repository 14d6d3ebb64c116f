"""The parts that compute with the policy's weights, as the driver sees them: in its own process, or in others."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.engine.base import Engine
from skyrl_train.learner.base import Learner
from skyrl_train.weights.base import Weights


@dataclass(frozen=True, slots=True)
class ComputingParts:
    """The learner, the engine, and the way of new weights between them."""

    learner: Learner
    engine: Engine
    weights: Weights
