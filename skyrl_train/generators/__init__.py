"""SkyRL's import path `skyrl_train.generators`."""

from skyrl_train.generators.base import (
    BatchMetadata,
    GeneratorInput,
    GeneratorInterface,
    GeneratorOutput,
    TrainingPhase,
    TrajectoryID,
)

__all__ = [
    "BatchMetadata",
    "GeneratorInput",
    "GeneratorInterface",
    "GeneratorOutput",
    "TrainingPhase",
    "TrajectoryID",
]
