"""A user's estimator, called on a small batch before anything is loaded: what is wrong with it shows at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loguru import logger

from skyrl_train.algorithms.advantages import estimated
from skyrl_train.algorithms.registry import AdvantageEstimatorRegistry
from skyrl_train.algorithms.skyrl_style import is_ours, name_of
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from skyrl_train.config import AlgorithmConfig


def check_estimator(algorithm: AlgorithmConfig) -> None:
    """Call the configured estimator once, unless it is one of ours. Raises what it raises; warns of zeros alone."""
    function = AdvantageEstimatorRegistry.get(algorithm.advantage_estimator)
    if is_ours(function):
        return
    batch = trial_batch()
    try:
        advantages, _ = estimated(batch, algorithm)
    except Exception as error:
        error.add_note(f"while the advantage estimator {name_of(function)} was tried on a batch of 4 trajectories")
        raise
    if not advantages[batch.loss_mask].any():
        logger.warning(
            f"the advantage estimator {name_of(function)} returned zeros alone for 4 trajectories of 2 prompts with "
            "rewards 1, 0, 0.5, 1: with advantages of 0 nothing is learned"
        )


def trial_batch(copies: int = 1) -> Batch:
    """Four trajectories of two prompts with scores 1, 0, 0.5, 1; responses of 5, 3, 4 and 2 tokens, one observed."""
    masks = ["0011011", "00111", "001111", "0011"] * copies
    scores = [1.0, 0.0, 0.5, 1.0] * copies
    lengths = torch.tensor([len(mask) for mask in masks])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    loss_mask = torch.tensor([letter == "1" for mask in masks for letter in mask])
    rewards = torch.zeros(len(loss_mask))
    rewards[offsets[1:] - 1] = torch.tensor(scores)
    return Batch(
        input_ids=torch.arange(len(loss_mask)),
        offsets=offsets,
        loss_mask=loss_mask,
        rollout_logprobs=torch.where(loss_mask, -0.5, 0.0),
        rewards=rewards,
        group_index=torch.arange(len(masks)) // 2,
        trajectory_index=torch.arange(len(masks)),
        num_prompt_tokens=torch.full((len(masks),), 2),
    )
