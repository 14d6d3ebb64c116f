"""SkyRL's import path `skyrl_train.utils.trainer_utils`: the values of `trainer.resume_mode`."""

from enum import StrEnum


class ResumeMode(StrEnum):
    """The start of a run: afresh, from its newest checkpoint, or from `trainer.resume_path`."""

    NONE = "none"
    LATEST = "latest"
    FROM_PATH = "from_path"


__all__ = ["ResumeMode"]
