"""The KL between policy and reference: estimators per token, in the loss or in the reward.

The estimators are Schulman's ("Approximating KL divergence", joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.masked import masked_mean, row_sums
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from skyrl_train.config import AlgorithmConfig

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Return the KL per token [T], 0 outside the mask, with a gradient to `logprobs`. d = logprobs - ref_logprobs.

    k1: d    abs: |d|    k2: d^2 / 2    k3: exp(-d) + d - 1, with d kept in [-20, 20] and the result in [-10, 10]
    Both logprobs must be at the same temperature.
    """
    difference = torch.where(mask, logprobs - ref_logprobs, 0.0)
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference.abs()
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        exponent = (-difference).clamp(-20.0, 20.0)
        return (exponent.exp() - exponent - 1).clamp(-10.0, 10.0)
    raise ValueError(f"kl_estimator_type={estimator!r} is unknown; use one of {', '.join(KL_ESTIMATORS)}")


@torch.no_grad()
def batch_kl(batch: Batch, estimator: str) -> Tensor:
    """Return [T] the KL between the policy before the update and the reference, 0 outside the loss mask."""
    if batch.old_logprobs is None or batch.ref_logprobs is None:
        raise ValueError("KL in the reward needs old_logprobs and ref_logprobs: call learner.add_logprobs first")
    return token_kl(batch.old_logprobs, batch.ref_logprobs, batch.loss_mask, estimator)


def with_kl_in_rewards(batch: Batch, coefficient: float, estimator: str) -> Batch:
    """Return the batch with rewards r_t - coefficient * KL_t on its trained tokens."""
    return replace(batch, rewards=batch.rewards - coefficient * batch_kl(batch, estimator))


def kl_metrics(batch: Batch, coefficient: float, estimator: str) -> dict[str, float]:
    """Return the metrics of the KL; `loss/avg_kl`, the mean over episodes of their mean, steers the controller."""
    kl = batch_kl(batch, estimator)
    episodes, episode_of_sample = batch.trajectory_index.unique(return_inverse=True)
    episode_of_token = episode_of_sample[batch.sample_index]
    sums = row_sums(kl, batch.loss_mask, episode_of_token, len(episodes))
    counts = row_sums(torch.ones_like(kl), batch.loss_mask, episode_of_token, len(episodes))
    means = sums / counts.clamp(min=1)
    return {
        "loss/avg_kl": float(masked_mean(means, counts > 0)),
        "loss/avg_kl_max": float(kl.max()),
        "loss/kl_loss_coef": coefficient,
    }


@dataclass
class KLController:
    """The weight of the KL in the reward. Without a target it is fixed; with one it adapts (arXiv 1909.08593, eq. 3).

    coefficient <- coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)

    num_samples: episodes, however many samples their turns became.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10000.0

    def update(self, kl: float, num_samples: int) -> None:
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


def kl_controller(algorithm: AlgorithmConfig) -> KLController:
    control = algorithm.kl_ctrl
    if control.type == "fixed":
        return KLController(algorithm.kl_loss_coef)
    if control.type == "adaptive":
        return KLController(algorithm.kl_loss_coef, control.kl_target, control.horizon)
    raise ValueError(f"kl_ctrl.type={control.type!r} is unknown; use fixed or adaptive")
