"""SkyRL's import path `skyrl_train.dataset`."""

from skyrl_train.prompts import PromptDataset

__all__ = ["PromptDataset"]
