"""The in-process engine: the learner's own weights, continuous batching, keys and values shared and kept."""

from skyrl_train.engine.torch.engine import TorchEngine
from skyrl_train.engine.torch.scheduler import EngineStats

__all__ = ["EngineStats", "TorchEngine"]
