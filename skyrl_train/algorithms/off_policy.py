"""Corrections for logprobs that differ between engine and learner: weigh tokens, or drop samples.

Truncated importance sampling: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al.,
2025). Sequence masks: "When Speed Kills Stability" (Liu et al., 2025). Everywhere d = old_logprobs - rollout_logprobs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.masked import masked_mean, masked_std, row_sums, safe_exp


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sample_index: Tensor,
    *,
    level: str,
    cap: float,
) -> tuple[Tensor, dict[str, float]]:
    """Return weights [T] of the token loss: min(exp(d), cap) of the token, or min(exp(sum of d), cap) of its sample."""
    if cap <= 0:
        raise ValueError(f"the cap of the importance weights is {cap}; it must be positive (2.0 is usual)")
    difference = torch.where(mask, old_logprobs - rollout_logprobs, 0.0)
    if level == "token":
        ratio = safe_exp(difference)
        metrics = {"tis_token_clip_high_ratio": float(masked_mean((ratio > cap).float(), mask))}
    elif level == "sequence":
        ratio_of_row = safe_exp(row_sums(difference, mask, sample_index, int(sample_index.max()) + 1))
        ratio = ratio_of_row[sample_index]
        metrics = {"tis_seq_clip_high_ratio": float((ratio_of_row > cap).float().mean())}
    else:
        raise ValueError(f"tis_ratio_type={level!r} is unknown; use token, sequence or null")
    return ratio.clamp(max=cap), metrics


@torch.no_grad()
def outlier_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sample_index: Tensor,
    *,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the mask without the samples in which the ratio exp(d) of any trained token is outside [low, high]."""
    ratio = safe_exp(torch.where(mask, old_logprobs - rollout_logprobs, 0.0))
    is_over = ratio > (torch.inf if high is None else high)
    is_under = ratio < (0.0 if low is None else low)
    num_rows = int(sample_index.max()) + 1
    over = row_sums(is_over.float(), mask, sample_index, num_rows) > 0
    under = row_sums(is_under.float(), mask, sample_index, num_rows) > 0
    metrics = {
        "outlier_seq_masked_ratio": _mean(over | under),
        "outlier_seq_over_high_ratio": _mean(over),
        "outlier_seq_under_low_ratio": _mean(under),
    }
    return mask & ~(over | under)[sample_index], metrics


@torch.no_grad()
def token_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float | None, high: float | None
) -> tuple[Tensor, dict[str, float]]:
    """Return the mask without the tokens whose ratio exp(d) is outside [low, high]; no metrics without a bound.

    IcePop (arXiv 2510.18855) keeps the ratio as a weight inside the bounds: tis_ratio_type=token beside it.
    """
    if low is None and high is None:
        return mask, {}
    ratio = safe_exp(torch.where(mask, old_logprobs - rollout_logprobs, 0.0))
    over = mask & (ratio > (torch.inf if high is None else high))
    under = mask & (ratio < (0.0 if low is None else low))
    metrics = {
        "token_mask_ratio": float(masked_mean((over | under).float(), mask)),
        "token_mask_over_high_ratio": float(masked_mean(over.float(), mask)),
        "token_mask_under_low_ratio": float(masked_mean(under.float(), mask)),
    }
    return mask & ~over & ~under, metrics


@torch.no_grad()
def sequence_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sample_index: Tensor,
    *,
    metric: str,
    low: float,
    high: float,
) -> tuple[Tensor, dict[str, float]]:
    """Return the mask without the samples whose ratio lies outside [low, high].

    product: exp(sum of d), geometric: exp(mean of d), over the trained tokens of the sample.
    """
    if metric not in ("product", "geometric"):
        raise ValueError(f"sequence_mask_metric={metric!r} is unknown; use product, geometric or null")
    num_rows = int(sample_index.max()) + 1
    log_ratio = row_sums(old_logprobs - rollout_logprobs, mask, sample_index, num_rows)
    if metric == "geometric":
        log_ratio = log_ratio / row_sums(torch.ones_like(old_logprobs), mask, sample_index, num_rows).clamp(min=1)
    ratio = safe_exp(log_ratio)
    over, under = ratio > high, ratio < low
    name = "geo" if metric == "geometric" else "product"
    metrics = {
        f"{name}_sequence_mask_masked_ratio": _mean(over | under),
        f"{name}_sequence_mask_over_high_ratio": _mean(over),
        f"{name}_sequence_mask_under_low_ratio": _mean(under),
    }
    return mask & ~(over | under)[sample_index], metrics


@torch.no_grad()
def ratio_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Return statistics of the ratio exp(d) over the masked tokens only."""
    if not mask.any():
        return {}
    ratio = safe_exp(torch.where(mask, old_logprobs - rollout_logprobs, 0.0))
    return {
        "is_ratio_mean": float(masked_mean(ratio, mask)),
        "is_ratio_std": float(masked_std(ratio, mask)),
        "is_ratio_max": float(ratio[mask].max()),
        "is_ratio_min": float(ratio[mask].min()),
    }


def _mean(condition: Tensor) -> float:
    return float(condition.float().mean())
