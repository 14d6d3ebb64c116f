"""Advantages: how much better than expected each trajectory, or each token, was.

An advantage estimator is any function that returns (advantages, returns). It is called with those of the following
that it names as parameters. Ours are flat, and so is what it returns then (T tokens, S samples):
    batch                the whole Batch
    rewards, loss_mask   [T] float, [T] bool
    sample_index         [T], which sample each token belongs to
    group_index          [S], which prompt
    trajectory_index     [S], which trajectory
    values               [T] from a critic, or None
    named_rewards        those of each trajectory by name (multi_reward.py), or None
    config, grpo_norm_by_std, gamma, lambd
A function that names none of them but SkyRL's `token_level_rewards`, `response_mask`, `index` (or takes **kwargs alone)
gets and returns [trajectories, response tokens]: see skyrl_style.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.kl import with_kl_in_rewards
from skyrl_train.algorithms.masked import masked_mean, whiten
from skyrl_train.algorithms.registry import AdvantageEstimatorRegistry, call_with_named, register_advantage_estimator
from skyrl_train.algorithms.skyrl_style import call_estimator, checked_pair, is_skyrl_style
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from skyrl_train.algorithms.multi_reward import NamedRewards
    from skyrl_train.config import AlgorithmConfig


def add_advantages(
    batch: Batch,
    algorithm: AlgorithmConfig,
    kl_coefficient: float | None = None,
    named_rewards: NamedRewards | None = None,
) -> Batch:
    """Return the batch with `advantages` and `returns`, both 0 wherever loss_mask is False.

    With `kl_coefficient` (use_kl_in_reward) the KL to the reference is first taken from the rewards.
    """
    if algorithm.zero_variance_filter:
        batch = zero_variance_filter(batch)
    if kl_coefficient is not None:
        batch = with_kl_in_rewards(batch, kl_coefficient, algorithm.kl_estimator_type)
    advantages, returns = estimated(batch, algorithm, named_rewards)
    advantages = torch.where(batch.loss_mask, advantages, 0.0)
    if algorithm.advantage_batch_normalize:
        advantages = normalize_advantages(advantages, batch.loss_mask)
    return replace(batch, advantages=advantages.float(), returns=torch.where(batch.loss_mask, returns, 0.0).float())


def estimated(
    batch: Batch, algorithm: AlgorithmConfig, named_rewards: NamedRewards | None = None
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), both [T], of the estimator that the configuration names."""
    estimator = AdvantageEstimatorRegistry.get(algorithm.advantage_estimator)
    settings = {
        "values": batch.values,
        "named_rewards": named_rewards,
        "config": algorithm,
        "grpo_norm_by_std": algorithm.grpo_norm_by_std,
        "gamma": algorithm.gamma,
        "lambd": algorithm.lambd,
    }
    if is_skyrl_style(estimator):
        return call_estimator(estimator, batch, settings)
    answer = call_with_named(
        estimator,
        {
            "batch": batch,
            "rewards": batch.rewards,
            "loss_mask": batch.loss_mask,
            "sample_index": batch.sample_index,
            "group_index": batch.group_index,
            "trajectory_index": batch.trajectory_index,
            **settings,
        },
    )
    return checked_pair(answer, estimator, (batch.num_tokens,), "tokens")


def group_metrics(batch: Batch) -> dict[str, float]:
    """Return `reward/equal_group_share`: of the prompts, those whose trajectories all scored the same.

    Group-relative advantages are 0 there. So it is for a prompt with one trajectory, where the others failed.
    """
    scores, groups, _ = trajectory_scores(batch)
    equal = groups[has_equal_rewards(scores, groups)].unique().numel()
    return {"reward/equal_group_share": equal / groups.unique().numel()}


def advantage_metrics(batch: Batch, *, distills: bool = False) -> dict[str, float]:
    """Return means over the trajectories and the trained tokens, under SkyRL's names, and how many tokens those are.

    `distills`: also the mean gap between policy and teacher, an estimate of the reverse KL.

    Tokens that a filter took out of the loss are not trained: a filter that empties the batch leaves 0.
    """
    if batch.advantages is None:
        raise ValueError("the batch has no advantages yet: call add_advantages first")
    scores, _, _ = trajectory_scores(batch)
    of_teacher = {"loss/reverse_kl": float(masked_mean(teacher_gap(batch), batch.loss_mask))} if distills else {}
    return {
        **of_teacher,
        "loss/avg_final_rewards": float(scores.mean()),
        "loss/avg_raw_advantages": float(masked_mean(batch.advantages, batch.loss_mask)),
        "loss/avg_raw_advantages_abs": float(masked_mean(batch.advantages.abs(), batch.loss_mask)),
        "loss/num_trained_tokens": float(batch.loss_mask.sum()),
    }


@register_advantage_estimator("grpo")
def grpo(batch: Batch, grpo_norm_by_std: bool) -> tuple[Tensor, Tensor]:
    """Group-relative advantages of the trajectory scores, on every trained token of the trajectory."""
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    advantages = group_relative_advantages(scores, groups, divide_by_std=grpo_norm_by_std)
    return on_tokens(advantages, trajectory_of_sample, batch)


@register_advantage_estimator("rloo")
def rloo(batch: Batch) -> tuple[Tensor, Tensor]:
    """Leave-one-out advantages of the trajectory scores, on every trained token of the trajectory."""
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    return on_tokens(leave_one_out_advantages(scores, groups), trajectory_of_sample, batch)


@register_advantage_estimator("maxrl")
def maxrl(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean-normalised advantages of the trajectory scores, on every trained token of the trajectory."""
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    return on_tokens(mean_normalized_advantages(scores, groups), trajectory_of_sample, batch)


@register_advantage_estimator("reinforce++")
def reinforce_plus_plus(batch: Batch, gamma: float) -> tuple[Tensor, Tensor]:
    """REINFORCE++ (arXiv 2501.03262): the discounted return of each token, whitened over the trained tokens.

    G_k = r_k + gamma * G_{k+1},  k counts the sampled tokens of a trajectory, over all its samples
    """
    tokens, trajectories = _sampled_tokens(batch)
    returns = torch.zeros_like(batch.rewards)
    returns[tokens] = discounted_sums(batch.rewards[tokens], trajectories, gamma)
    return whiten(returns, batch.loss_mask), returns


@register_advantage_estimator("gae")
def gae(batch: Batch, values: Tensor | None, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16), whitened; the returns are not.

        d_k = r_k + gamma * V_{k+1} - V_k,   A_k = d_k + gamma * lambda * A_{k+1},   returns = A + V
    k counts the sampled tokens of a trajectory: observations are stepped over, and after the last token V = A = 0.
    """
    if values is None:
        raise ValueError("advantage_estimator=gae needs values: set trainer.critic.model.path, or use grpo or rloo")
    tokens, trajectories = _sampled_tokens(batch)
    value = values[tokens]
    next_value = torch.zeros_like(value)
    has_next = trajectories[1:] == trajectories[:-1]
    next_value[:-1] = torch.where(has_next, value[1:], 0.0)
    advantages = torch.zeros_like(values)
    delta = batch.rewards[tokens] + gamma * next_value - value
    advantages[tokens] = discounted_sums(delta, trajectories, gamma * lambd)
    return whiten(advantages, batch.loss_mask), advantages + torch.where(batch.loss_mask, values, 0.0)


@register_advantage_estimator("distillation")
def distillation(batch: Batch, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return, for on-policy distillation, how much more likely the teacher finds each token of the policy.

        A_t = log p_teacher(t) - log p_policy(t) + reward_weight * A_t of GRPO
    The mean of the first term over the policy's own samples is minus the reverse KL, so the update follows its gradient
    token by token, without a discount (arXiv 2306.08543, MiniLLM, and 2306.13649, GKD, with reverse KL and only the
    student's samples; Thinking Machines Lab 2025, "On-Policy Distillation"). Both logprobs are at the temperature of
    the sampling. The rewards count only with reward_weight > 0.
    """
    advantages = torch.where(batch.loss_mask, -teacher_gap(batch), 0.0)
    weight = config.distillation.reward_weight
    if weight > 0:
        advantages = advantages + weight * grpo(batch, config.grpo_norm_by_std)[0]
    return advantages, advantages


def teacher_gap(batch: Batch) -> Tensor:
    """Return [T] log p_policy - log p_teacher of the sampled tokens, before the update."""
    if batch.old_logprobs is None or batch.ref_logprobs is None:
        raise ValueError("distillation needs old_logprobs and the teacher's ref_logprobs: call add_logprobs first")
    return batch.old_logprobs - batch.ref_logprobs


def group_relative_advantages(rewards: Tensor, group_ids: Tensor, *, divide_by_std: bool) -> Tensor:
    """Return how much better each trajectory did than its siblings on the same prompt.

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)   GRPO, arXiv 2402.03300, with divide_by_std; unbiased std
        A_i = r_i - mean(r)                       Dr. GRPO, arXiv 2503.20783
    rewards, group_ids: [trajectories]. 0 where all siblings scored the same, and for a trajectory without siblings.
    """
    group, size = _groups(group_ids)
    mean = rewards.new_zeros(len(size)).index_add(0, group, rewards) / size
    centred = torch.where(has_equal_rewards(rewards, group_ids), 0.0, rewards - mean[group])
    if not divide_by_std:
        return centred
    variance = rewards.new_zeros(len(size)).index_add(0, group, centred**2) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt()[group] + 1e-6)


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): A_i = r_i - mean of the others = (r_i - mean(r)) * n / (n - 1); 0 without siblings."""
    group, size = _groups(group_ids)
    centred = group_relative_advantages(rewards, group_ids, divide_by_std=False)
    return centred * (size / (size - 1).clamp(min=1))[group]


def mean_normalized_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """MaxRL (arXiv 2602.02710): A_i = (r_i - mean(r)) / mean(r), so that rare successes weigh more; 0 without any.

    ValueError for a reward below 0: the mean stands for the rate of success.
    """
    if (rewards < 0).any():
        raise ValueError(
            f"advantage_estimator=maxrl divides by the mean reward of a group, so no episode may score below 0; one "
            f"scored {float(rewards.min()):g}; use grpo or rloo, or an environment without penalties"
        )
    group, size = _groups(group_ids)
    mean = (rewards.new_zeros(len(size)).index_add(0, group, rewards) / size)[group]
    centred = group_relative_advantages(rewards, group_ids, divide_by_std=False)
    return torch.where(mean > 0, centred / mean, 0.0)


def has_equal_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return [trajectories] bool: whether its group scored the same, up to rounding (max - min <= 1e-6 * scale)."""
    group, size = _groups(group_ids)
    index = torch.full((len(size),), torch.inf, dtype=rewards.dtype, device=rewards.device)
    highest = (-index).scatter_reduce(0, group, rewards, "amax")
    lowest = index.scatter_reduce(0, group, rewards, "amin")
    scale = torch.maximum(highest.abs(), lowest.abs()).clamp(min=1.0)
    return (highest - lowest <= 1e-6 * scale)[group]


def normalize_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return advantages with mean 0 and biased variance 1 (at least 1e-8) over the masked tokens, 0 elsewhere."""
    centred = torch.where(mask, advantages - masked_mean(advantages, mask), 0.0)
    return centred * torch.rsqrt(masked_mean(centred**2, mask).clamp(min=1e-8))


def zero_variance_filter(batch: Batch) -> Batch:
    """Take groups whose trajectories all scored the same out of the loss. A trajectory without siblings stays."""
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    group, size = _groups(groups)
    is_dropped = (has_equal_rewards(scores, groups) & (size[group] > 1))[trajectory_of_sample]
    return replace(batch, loss_mask=batch.loss_mask & ~is_dropped[batch.sample_index])


def trajectory_scores(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return each trajectory's score (the sum of the rewards of its samples) and group, and each sample's trajectory.

    The first two are [trajectories], the last is [S]; scores are float64, so that equal episodes score equally.
    """
    trajectories, trajectory_of_sample = batch.trajectory_index.unique(return_inverse=True)
    token_trajectory = trajectory_of_sample[batch.sample_index]
    scores = torch.zeros(len(trajectories), dtype=torch.float64, device=batch.rewards.device)
    scores = scores.index_add(0, token_trajectory, batch.rewards.double())
    groups = torch.zeros_like(trajectories).scatter(0, trajectory_of_sample, batch.group_index)
    return scores, groups, trajectory_of_sample


def discounted_sums(values: Tensor, rows: Tensor, factor: float) -> Tensor:
    """Return [N] y_k = values_k + factor * y_{k+1} within each row. rows: [N], non-decreasing."""
    _, row, lengths = rows.unique_consecutive(return_inverse=True, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    column = torch.arange(len(values), device=values.device) - starts[row]
    table = values.new_zeros(len(lengths), int(lengths.max()) if len(lengths) else 0)
    table[row, column] = values
    for k in range(table.shape[1] - 2, -1, -1):
        table[:, k] += factor * table[:, k + 1]
    return table[row, column]


def _groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group of each trajectory, numbered from 0, and the size of each group."""
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    return group, size


def on_tokens(advantages: Tensor, trajectory_of_sample: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return one number per trajectory on each of its trained tokens, as advantages and as returns."""
    on_tokens = torch.where(batch.loss_mask, advantages[trajectory_of_sample][batch.sample_index], 0.0)
    return on_tokens, on_tokens


def _sampled_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the positions of the trained tokens, ordered by trajectory, and the trajectory of each."""
    tokens = torch.nonzero(batch.loss_mask).flatten()
    trajectories = batch.trajectory_index[batch.sample_index][tokens]
    order = trajectories.argsort(stable=True)
    return tokens[order], trajectories[order]
