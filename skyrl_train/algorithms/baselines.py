"""Other baselines for the score of a trajectory than the mean of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.advantages import (
    group_relative_advantages,
    has_equal_rewards,
    on_tokens,
    trajectory_scores,
)
from skyrl_train.algorithms.registry import register_advantage_estimator
from skyrl_train.types import Batch


@register_advantage_estimator("opo")
def opo(batch: Batch) -> tuple[Tensor, Tensor]:
    """Advantages over the baseline of least variance, on every trained token of the trajectory."""
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    lengths = torch.zeros_like(scores).index_add(0, trajectory_of_sample[batch.sample_index], batch.loss_mask.double())
    return on_tokens(length_weighted_advantages(scores, groups, lengths), trajectory_of_sample, batch)


@register_advantage_estimator("pass_at_k")
def pass_at_k(batch: Batch) -> tuple[Tensor, Tensor]:
    """Advantages for the best episode of a group alone, on every trained token of the trajectory."""
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    return on_tokens(best_of_group_advantages(scores, groups), trajectory_of_sample, batch)


@register_advantage_estimator("gpg")
def gpg(batch: Batch) -> tuple[Tensor, Tensor]:
    """GPG (arXiv 2504.02546): A_i = alpha (r_i - mean(r)), on every trained token of the trajectory.

    alpha = groups / groups that do not score equally: those that do have no gradient, and the batch mean counts them.
    """
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    advantages = group_relative_advantages(scores, groups, divide_by_std=False)
    num_useful = groups[~has_equal_rewards(scores, groups)].unique().numel()
    return on_tokens(advantages * (groups.unique().numel() / max(num_useful, 1)), trajectory_of_sample, batch)


def length_weighted_advantages(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """OPO (arXiv 2505.23585): A_i = r_i - sum(l r) / sum(l) over the group, l the trained tokens of each.

    0 where all siblings scored the same, and for a trajectory without siblings.
    """
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    weighted = rewards.new_zeros(len(size)).index_add(0, group, lengths * rewards)
    total = rewards.new_zeros(len(size)).index_add(0, group, lengths).clamp(min=1.0)
    return torch.where(has_equal_rewards(rewards, group_ids), 0.0, rewards - (weighted / total)[group])


def best_of_group_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Pass@k (arXiv 2503.19595): A_i = max(r) - max of the others, for the objective max(r) of a group of k.

    So the best one gets its lead over the second, and all others 0; 0 where two are the best, and without siblings.
    """
    advantages = torch.zeros_like(rewards)
    equal = has_equal_rewards(rewards, group_ids)
    for group in group_ids.unique():
        members = torch.nonzero(group_ids == group).flatten()
        if len(members) > 1 and not equal[members[0]]:
            best, second = rewards[members].topk(2).values
            advantages[members[rewards[members].argmax()]] = best - second
    return advantages
