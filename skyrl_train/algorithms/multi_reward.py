"""Several named rewards of one trajectory: how they become advantages without drowning each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_train.algorithms.advantages import group_relative_advantages, on_tokens, trajectory_scores
from skyrl_train.algorithms.registry import register_advantage_estimator
from skyrl_train.config.rewards import UNNAMED
from skyrl_train.types import Batch, Sample, Trajectory


@dataclass(frozen=True)
class NamedRewards:
    """The rewards of each trajectory of a batch by name, before their weights.

    values: [trajectories, names] float64, in the order of the batch's trajectory numbers. weights: [names].
    """

    names: tuple[str, ...]
    values: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if self.values.shape[1:] != (len(self.names),) or self.weights.shape != (len(self.names),):
            raise ValueError(
                f"{len(self.names)} names, values {list(self.values.shape)} and weights {list(self.weights.shape)}"
            )


def named_rewards(
    samples: Sequence[Sample], trajectories: Iterable[Trajectory], weights: Mapping[str, float]
) -> NamedRewards | None:
    """Return the named rewards of the trajectories that gave these samples; None if none of them has a name.

    A name without a weight weighs 1. A trajectory that was not paid under a name earned 0 there. What it was paid
    beside the weighted sum of its names (a penalty for length, a hook) stands under the name `unnamed`.
    """
    by_id = {trajectory.id: trajectory for trajectory in trajectories}
    played = [by_id[name] for name in dict.fromkeys(sample.trajectory_id for sample in samples)]
    rewards = [trajectory.rewards for trajectory in played]
    names = sorted({name for found in rewards for name in found})
    if not names:
        return None
    rest = [_rest(t.reward, found, weights) for t, found in zip(played, rewards, strict=True)]
    rows = [[found.get(name, 0.0) for name in names] for found in rewards]
    if any(rest):
        names, rows = [*names, UNNAMED], [[*row, more] for row, more in zip(rows, rest, strict=True)]
    return NamedRewards(
        tuple(names),
        torch.tensor(rows, dtype=torch.float64),
        torch.tensor([weights.get(name, 1.0) for name in names], dtype=torch.float64),
    )


@register_advantage_estimator("gdpo")
def gdpo(batch: Batch, named_rewards: NamedRewards | None) -> tuple[Tensor, Tensor]:
    """GDPO (arXiv 2601.05242, section 3), on every trained token of the trajectory.

        A_k = (r_k - mean(r_k)) / std(r_k)    of each reward k within the group of trajectory i (GRPO of that reward)
        A   = sum over k of w_k A_k
        A'  = (A - mean(A)) / std(A)          over all trajectories of the batch
    A reward with a wide spread does not drown the others, and a weight says how much a reward counts, whatever its
    scale. All standard deviations are unbiased and 1e-6 is added to them; a reward that is equal in a group gives 0.
    ValueError for a batch that was paid without names. One that was paid nothing, as where a limit cut every episode
    before its first reward, gives 0.
    """
    scores, groups, trajectory_of_sample = trajectory_scores(batch)
    if named_rewards is None and not scores.any():
        return on_tokens(torch.zeros_like(scores), trajectory_of_sample, batch)
    if named_rewards is None:
        raise ValueError(
            "advantage_estimator=gdpo needs several named rewards, and this batch was paid without names; set "
            "environment.rewards, have the environment return its reward as {name: number}, or use grpo"
        )
    columns = named_rewards.values.to(batch.rewards.device).unbind(dim=1)
    weights = named_rewards.weights.tolist()
    total = torch.zeros_like(columns[0])
    for column, weight in zip(columns, weights, strict=True):
        total += weight * group_relative_advantages(column, groups, divide_by_std=True)
    return on_tokens(batch_normalized(total), trajectory_of_sample, batch)


def batch_normalized(advantages: Tensor) -> Tensor:
    """Return (A - mean) / (std + 1e-6) over the trajectories, with the unbiased std; 0 where all are equal."""
    centred = advantages - advantages.mean()
    if len(advantages) < 2 or float(centred.abs().max()) <= 1e-6:
        return torch.zeros_like(advantages)
    return centred / (advantages.std() + 1e-6)


def _rest(total: float, rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return what was paid beside the weighted sum, 0 where that is rounding."""
    parts = [weights.get(name, 1.0) * value for name, value in rewards.items()]
    rest = total - sum(parts)
    scale = max([1.0, abs(total), *map(abs, parts)])
    return rest if abs(rest) > 1e-9 * scale else 0.0
