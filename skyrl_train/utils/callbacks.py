"""SkyRL's import path `skyrl_train.utils.callbacks`."""

from skyrl_train.callbacks import CallbackInput, TrainingCallback, TrainingControl

__all__ = ["CallbackInput", "TrainingCallback", "TrainingControl"]
