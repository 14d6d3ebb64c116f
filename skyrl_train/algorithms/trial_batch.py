"""The small batch on which functions of users are tried."""

from __future__ import annotations

import torch

from skyrl_train.types import Batch


def trial_batch(copies: int = 1) -> Batch:
    """Return four trajectories of two prompts, scores 1, 0, 0.5, 1; responses of 5, 3, 4, 2 tokens, one observed."""
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
