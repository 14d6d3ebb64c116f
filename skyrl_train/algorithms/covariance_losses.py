"""Two losses which treat the tokens of highest covariance apart, to keep the entropy up (arXiv 2505.22617).

The covariance of a token, (A - mean A) (log p - mean log p), compares it with all others of the optimizer step. So
these losses are `of_whole_mini_batch`: the learner evaluates them on all tokens of a mini batch, not per micro batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.losses import Loss
from skyrl_train.algorithms.masked import masked_mean, safe_exp
from skyrl_train.algorithms.registry import F, register_policy_loss


def of_whole_mini_batch(loss: F) -> F:
    """Mark a policy loss whose value at one token depends on tokens of other samples."""
    vars(loss)["of_whole_mini_batch"] = True
    return loss


@register_policy_loss("clip_cov")
@of_whole_mini_batch
def clip_cov(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    generator: torch.Generator,
    eps_clip_low: float,
    eps_clip_high: float,
    clip_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
) -> Loss:
    """Clip-Cov (arXiv 2505.22617, eq. 12): the clipped surrogate, and a few tokens drawn at random have no gradient.

    Drawn among the tokens that are not clipped and whose covariance lies in (lb, ub): max(int(clip_ratio * N), 1) of N.
    """
    ratio = safe_exp(torch.where(loss_mask, log_probs - old_log_probs, 0.0))
    free = -ratio * advantages
    clipped = -ratio.clamp(1.0 - eps_clip_low, 1.0 + eps_clip_high) * advantages
    is_clipped = loss_mask & (clipped > free)
    covariance = _covariance(log_probs.detach(), advantages, loss_mask)
    is_candidate = loss_mask & ~is_clipped & (covariance > clip_cov_lb) & (covariance < clip_cov_ub)
    candidates = torch.nonzero(is_candidate).flatten()
    num_dropped = max(int(clip_ratio * int(loss_mask.sum())), 1)
    order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
    is_dropped = torch.zeros_like(loss_mask)
    is_dropped[candidates[order[:num_dropped]]] = True
    loss = torch.where(loss_mask & ~is_dropped, torch.maximum(free, clipped), 0.0)
    return loss, {"clip_ratio": float(masked_mean((is_clipped | is_dropped).float(), loss_mask))}


@register_policy_loss("kl_cov")
@of_whole_mini_batch
def kl_cov(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    kl_cov_frac: float,
    ppo_kl_coef: float,
) -> Loss:
    """KL-Cov (arXiv 2505.22617, eq. 14): -r A, plus coef |log r| on the share of tokens with the highest covariance."""
    log_ratio = torch.where(loss_mask, log_probs - old_log_probs, 0.0)
    loss = torch.where(loss_mask, -safe_exp(log_ratio) * advantages, 0.0)
    covariance = _covariance(log_probs.detach(), advantages, loss_mask)
    num_masked = int(loss_mask.sum())
    num_penalized = min(max(1, int(kl_cov_frac * num_masked)), num_masked)
    ranking = torch.where(loss_mask, covariance, -torch.inf).argsort(descending=True, stable=True)
    is_penalized = torch.zeros_like(loss_mask)
    is_penalized[ranking[:num_penalized]] = True
    return loss + torch.where(is_penalized, ppo_kl_coef * log_ratio.abs(), 0.0), {"clip_ratio": 0.0}


def _covariance(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return [T] each token's term of the covariance of advantage and logprob over the masked tokens."""
    return (advantages - masked_mean(advantages, mask)) * (log_probs - masked_mean(log_probs, mask))
