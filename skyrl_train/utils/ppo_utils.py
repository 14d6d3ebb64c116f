"""SkyRL's import path `skyrl_train.utils.ppo_utils`: its registries, and its mathematics on padded tensors.

All tensors are [rows, response tokens]. Registered functions reach Ray's workers through `initialize_ray`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl_train.algorithms import (
    AdvantageEstimatorRegistry,
    PolicyLossRegistry,
    register_advantage_estimator,
    register_policy_loss,
)
from skyrl_train.algorithms.advantages import estimated
from skyrl_train.algorithms.kl import token_kl
from skyrl_train.algorithms.padded import sample_rows
from skyrl_train.algorithms.registry import FunctionRegistry as BaseFunctionRegistry
from skyrl_train.algorithms.values import value_loss
from skyrl_train.batch.packing import LOSS_REDUCTIONS
from skyrl_train.config import AlgorithmConfig
from skyrl_train.left_out import getter_of
from skyrl_train.types import Batch

__all__ = [
    "AdvantageEstimator",
    "AdvantageEstimatorRegistry",
    "BaseFunctionRegistry",
    "PolicyLossRegistry",
    "PolicyLossType",
    "compute_advantages_and_returns",
    "compute_approx_kl",
    "masked_mean",
    "ppo_critic_loss",
    "reduce_loss",
    "register_advantage_estimator",
    "register_policy_loss",
    "sync_registries",
]

__getattr__ = getter_of(__name__)


class AdvantageEstimator(StrEnum):
    """The estimators that are always there."""

    GAE = "gae"
    GRPO = "grpo"
    RLOO = "rloo"
    REINFORCE_PP = "reinforce++"


class PolicyLossType(StrEnum):
    """The policy losses that are always there."""

    REGULAR = "regular"
    DUAL_CLIP = "dual_clip"
    GSPO = "gspo"
    CISPO = "cispo"
    CLIP_COV = "clip_cov"
    KL_COV = "kl_cov"
    SAPO = "sapo"
    CROSS_ENTROPY = "cross_entropy"
    IMPORTANCE_SAMPLING = "importance_sampling"


def sync_registries() -> None:
    """Do nothing: `initialize_ray` gives every worker what is registered by then."""


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean of the masked entries, over everything or over `dim`; 0 where the mask is empty."""
    if mask is None:
        return tensor.mean() if dim is None else tensor.mean(dim)
    kept = torch.where(mask.bool(), tensor, 0.0) * mask
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def reduce_loss(loss: Tensor, loss_mask: Tensor | None, loss_reduction: str, max_seq_len: int | None = None) -> Tensor:
    """One number of a loss per token: token_mean, sequence_mean or seq_mean_token_sum_norm.

    A row without any masked token counts nowhere; in SkyRL it stays in the divisor of the means over rows.
    """
    mask = torch.ones_like(loss) if loss_mask is None else loss_mask.to(loss.dtype)
    if loss_reduction == "token_mean":
        return masked_mean(loss, mask)
    num_rows = (mask.sum(-1) > 0).sum().clamp(min=1)
    if loss_reduction == "sequence_mean":
        return masked_mean(loss, mask, dim=-1).sum() / num_rows
    if loss_reduction == "seq_mean_token_sum_norm":
        if not max_seq_len or max_seq_len < 1:
            raise ValueError(f"seq_mean_token_sum_norm divides by max_seq_len, which is {max_seq_len}: give one >= 1")
        return torch.where(mask.bool(), loss, 0.0).sum() / (max_seq_len * num_rows)
    raise ValueError(f"loss_reduction={loss_reduction!r} is unknown; use one of {', '.join(LOSS_REDUCTIONS)}")


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, loss_mask: Tensor | None = None, kl_estimator_type: str = "k3"
) -> Tensor:
    """The KL per token, 0 outside the mask, with a gradient to `log_probs`."""
    mask = torch.ones_like(log_probs, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    return token_kl(log_probs, log_probs_base, mask, kl_estimator_type)


def ppo_critic_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, config: AlgorithmConfig, loss_mask: Tensor | None = None
) -> tuple[Tensor, float | None]:
    """(loss, share of clipped values): the mean over rows of the row mean of the clipped value loss."""
    mask = torch.ones_like(values, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    token_loss, metrics = value_loss(values, old_values, returns, mask, config.value_clip)
    return reduce_loss(token_loss, mask, "sequence_mean"), metrics.get("values_clipfrac")


def compute_advantages_and_returns(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[str] | np.ndarray,
    adv_estimator: str,
    config: AlgorithmConfig,
    values: Tensor | None = None,
    grpo_norm_by_std: bool = True,
    gamma: float = 1.0,
    lambd: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of a registered estimator; whatever stands outside response_mask counts nothing."""
    algorithm = replace(
        config,
        advantage_estimator=str(adv_estimator),
        grpo_norm_by_std=grpo_norm_by_std,
        gamma=gamma,
        lambd=lambd,
    )
    batch = _batch(token_level_rewards, response_mask.bool(), list(index), values)
    rows = sample_rows(batch)
    advantages, returns = estimated(batch, algorithm)
    return rows.pad(advantages), rows.pad(returns)


def _batch(rewards: Tensor, mask: Tensor, uids: list[str], values: Tensor | None) -> Batch:
    """The padded rows end to end, each behind one prompt token."""
    num_rows, width = mask.shape

    def flat(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(num_rows, 1), x], dim=1).flatten()

    groups: dict[str, int] = {}
    loss_mask = flat(mask)
    return Batch(
        input_ids=torch.zeros(num_rows * (width + 1), dtype=torch.long),
        offsets=torch.arange(num_rows + 1) * (width + 1),
        loss_mask=loss_mask,
        rollout_logprobs=torch.zeros_like(loss_mask, dtype=torch.float32),
        rewards=flat(torch.where(mask, rewards, 0.0)),
        group_index=torch.tensor([groups.setdefault(str(uid), len(groups)) for uid in uids]),
        trajectory_index=torch.arange(num_rows),
        values=None if values is None else flat(values),
        num_prompt_tokens=torch.ones(num_rows, dtype=torch.long),
    )
