"""SkyRL's import path `skyrl_train.utils.tracking`."""

from skyrl_train.run.tracking import Tracking

__all__ = ["Tracking"]
