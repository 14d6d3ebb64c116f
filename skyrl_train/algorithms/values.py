"""The loss of a critic per token, and how much of the returns its values explain."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.masked import masked_mean


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, value_clip: float | None
) -> tuple[Tensor, dict[str, float]]:
    """Return (loss [T], metrics) of values after and before an update, and of the returns that they should predict.

        loss = 0.5 * max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)        with value_clip = c
        loss = 0.5 * (V - R)^2                                                     without
    PPO's own code (github.com/openai/baselines, ppo2) clips the value as it clips the ratio: a value that has moved
    further than c has no gradient, unless it moved away from the return. 0 outside loss_mask.
    """
    free = (values - returns) ** 2
    if value_clip is None:
        return torch.where(loss_mask, 0.5 * free, 0.0), {}
    clipped = (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns) ** 2
    loss = 0.5 * torch.maximum(free, clipped)
    return torch.where(loss_mask, loss, 0.0), {
        "values_clipfrac": float(masked_mean((clipped > free).float(), loss_mask))
    }


def explained_variance(values: Tensor, returns: Tensor, loss_mask: Tensor) -> float:
    """Return 1 - Var(R - V) / Var(R) over the masked tokens: 1 for perfect values, 0 for constant ones, less for worse.

    0 where all returns are equal: there is nothing to explain.
    """
    returns, errors = returns[loss_mask].double(), (returns - values)[loss_mask].double()
    if len(returns) < 2 or float(returns.max() - returns.min()) <= 1e-6 * max(1.0, float(returns.abs().max())):
        return 0.0
    return float(1.0 - errors.var(correction=0) / returns.var(correction=0))
