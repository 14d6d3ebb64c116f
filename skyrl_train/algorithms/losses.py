"""Policy losses per token. The learner multiplies them by the batch's loss_weights and sums: no loss divides.

A policy loss is any function that returns (token_loss [T], metrics). It is called with those of the following that it
names as parameters (T tokens; a [T] tensor holds junk wherever loss_mask is False, and so may the token loss):
    log_probs, old_log_probs, rollout_logprobs, advantages   [T]; old_log_probs has no gradient
    loss_mask      [T] bool
    sample_index   [T], which sample each token belongs to
    generator      torch.Generator, seeded by trainer.seed and the step
    config         trainer.algorithm, and each of its values under its own name: eps_clip_low, tau_pos, ...
A loss from outside that does not ask for sample_index gets SkyRL's tensors instead, [samples, response tokens] with
loss_mask float and 0 in the padding, and returns one loss per token or SkyRL's scalar: see loss_style.py.
Metrics are means over the masked tokens, or end in _max or _min.

In the formulas r = exp(log_probs - old_log_probs) and A the advantage of the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.masked import masked_mean, row_sums, safe_exp
from skyrl_train.algorithms.registry import register_policy_loss

Loss = tuple[Tensor, dict[str, float]]


@register_policy_loss("regular")
def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    eps_clip_low: float,
    eps_clip_high: float,
) -> Loss:
    """PPO (arXiv 1707.06347, eq. 7): -min(r A, clip(r, 1 - low, 1 + high) A). DAPO's clip-higher is a larger high."""
    ratio = safe_exp(_log_ratio(log_probs, old_log_probs, loss_mask))
    return _clip(ratio, advantages, loss_mask, eps_clip_low, eps_clip_high)


@register_policy_loss("dual_clip")
def dual_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    eps_clip_low: float,
    eps_clip_high: float,
    clip_ratio_c: float,
) -> Loss:
    """Dual-clip PPO (arXiv 1912.09729, eq. 5): as regular, and where A < 0 the loss is at most -c A."""
    loss, metrics = clipped_surrogate(log_probs, old_log_probs, advantages, loss_mask, eps_clip_low, eps_clip_high)
    bounded = torch.minimum(loss, -clip_ratio_c * advantages)
    return torch.where(loss_mask & (advantages < 0), bounded, loss), metrics


@register_policy_loss("sapo")
def sapo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor, tau_pos: float, tau_neg: float
) -> Loss:
    """SAPO (arXiv 2511.20347): a soft gate instead of a clip: -A (4 / tau) sigmoid(tau (r - 1)).

    tau is tau_pos where A > 0, else tau_neg.
    """
    ratio = safe_exp(_log_ratio(log_probs, old_log_probs, loss_mask))
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    loss = -advantages * (4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0))
    return _masked(loss, loss_mask), {"clip_ratio": 0.0}


@register_policy_loss("gspo")
def gspo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    sample_index: Tensor,
    eps_clip_low: float,
    eps_clip_high: float,
) -> Loss:
    """GSPO-token (arXiv 2507.18071, eq. 13, 14): the clipped surrogate of the ratio of the whole sequence.

    The ratio is the geometric mean over the sample's trained tokens; the gradient flows through each token's logprob.
    """
    log_ratio = _log_ratio(log_probs, old_log_probs, loss_mask)
    num_rows = int(sample_index.max()) + 1
    counts = row_sums(torch.ones_like(log_ratio), loss_mask, sample_index, num_rows).clamp(min=1)
    mean_of_sequence = (row_sums(log_ratio.detach(), loss_mask, sample_index, num_rows) / counts)[sample_index]
    ratio = (log_ratio - log_ratio.detach() + mean_of_sequence).clamp(max=10.0).exp()
    return _clip(ratio, advantages, loss_mask, eps_clip_low, eps_clip_high)


@register_policy_loss("gmpo")
def gmpo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    sample_index: Tensor,
    eps_clip_low: float,
    eps_clip_high: float,
) -> Loss:
    """GMPO (arXiv 2507.20673): the geometric mean over the sequence of ratios that are clipped token by token.

    -A exp(mean of c), c = ln r, kept in [-low, high] where that is the smaller gain: low and high bound the logarithm.
    Every trained token of a sample has this loss, so loss_reduction=sequence_mean gives the paper's.
    """
    log_ratio = _log_ratio(log_probs, old_log_probs, loss_mask)
    clipped, sign = log_ratio.clamp(-eps_clip_low, eps_clip_high), advantages.sign()
    kept = sign * torch.minimum(sign * log_ratio, sign * clipped)
    num_rows = int(sample_index.max()) + 1
    counts = row_sums(torch.ones_like(kept), loss_mask, sample_index, num_rows).clamp(min=1)
    ratio = safe_exp(row_sums(kept, loss_mask, sample_index, num_rows) / counts)[sample_index]
    return _masked(-ratio * advantages, loss_mask), {"clip_ratio": _share(kept != log_ratio, loss_mask)}


@register_policy_loss("cispo")
def cispo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cispo_eps_clip_low: float,
    cispo_eps_clip_high: float,
) -> Loss:
    """CISPO (arXiv 2506.13585, eq. 4): -A sg(clip(r, 1 - low, 1 + high)) log p. Every token keeps its gradient."""
    ratio = safe_exp(_log_ratio(log_probs, old_log_probs, loss_mask)).detach()
    clipped = ratio.clamp(1.0 - cispo_eps_clip_low, 1.0 + cispo_eps_clip_high)
    loss = -advantages * clipped * log_probs
    return _masked(loss, loss_mask), {"clip_ratio": _share(ratio != clipped, loss_mask)}


@register_policy_loss("cross_entropy")
def cross_entropy(log_probs: Tensor, loss_mask: Tensor) -> Loss:
    """Supervised: -log p of the sampled tokens."""
    return _masked(-log_probs, loss_mask), {}


@register_policy_loss("importance_sampling")
def importance_sampling(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Loss:
    """The off-policy policy gradient without a clip: -r A."""
    ratio = safe_exp(_log_ratio(log_probs, old_log_probs, loss_mask))
    metrics = {"importance_ratio": float(masked_mean(ratio.detach(), loss_mask))}
    return _masked(-ratio * advantages, loss_mask), metrics


@register_policy_loss("dppo")
def dppo(
    log_probs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    dppo_divergence: str,
    dppo_max_divergence: float | None,
    dppo_max_ratio: float,
) -> Loss:
    """DPPO (arXiv 2602.04879): -A sg(min(r, max_ratio)) log p, without the tokens that go on leaving a trust region.

    r and the region are about the engine's distribution: with p and q the learner's and the engine's probability of the
    sampled token, the divergence is that of two coins,
        tv  |p - q|      kl  q ln(q / p) + (1 - q) ln((1 - q) / (1 - p))
    A token is left out if it is above dppo_max_divergence (null: 0.15 for tv, 0.05 for kl) and the advantage would move
    p further away from q.
    """
    log_ratio = _log_ratio(log_probs, rollout_logprobs, loss_mask).detach()
    p, q = log_probs.detach().exp(), rollout_logprobs.exp()
    if dppo_divergence == "tv":
        divergence, bound = (p - q).abs(), 0.15
    else:
        others = (1.0 - q) * (_log_of_the_rest(q) - _log_of_the_rest(p))
        divergence, bound = others - q * log_ratio, 0.05
    bound = bound if dppo_max_divergence is None else dppo_max_divergence
    is_left_out = (divergence > bound) & (log_ratio * advantages > 0)
    weight = safe_exp(log_ratio).clamp(max=dppo_max_ratio)
    loss = torch.where(is_left_out, 0.0, -advantages * weight * log_probs)
    return _masked(loss, loss_mask), {
        "clip_ratio": _share(is_left_out, loss_mask),
        "divergence": float(masked_mean(divergence, loss_mask)),
    }


@register_policy_loss("rollout_is")
def rollout_is(
    log_probs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    eps_clip_low: float,
    eps_clip_high: float,
) -> Loss:
    """GLM-5's loss for agents (arXiv 2602.15763, section 4.1.2): -A sg(r) log p where 1 - low < r < 1 + high, else 0.

    r = exp(log_probs - rollout_logprobs): one ratio holds the policy's step and the engine's difference. A token
    outside the bounds has no gradient, whatever the sign of its advantage.
    """
    ratio = safe_exp(_log_ratio(log_probs, rollout_logprobs, loss_mask)).detach()
    is_left_out = (ratio <= 1.0 - eps_clip_low) | (ratio >= 1.0 + eps_clip_high)
    loss = torch.where(is_left_out, 0.0, -advantages * ratio * log_probs)
    return _masked(loss, loss_mask), {"clip_ratio": _share(is_left_out, loss_mask)}


def _log_of_the_rest(probability: Tensor) -> Tensor:
    """Return ln(1 - p), finite for p = 1."""
    return torch.log1p(-probability.clamp(max=1.0 - 1e-7))


def _clip(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Loss:
    free = -ratio * advantages
    clipped = -ratio.clamp(1.0 - low, 1.0 + high) * advantages
    return _masked(torch.maximum(free, clipped), mask), {"clip_ratio": _share(clipped > free, mask)}


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return log_probs - old_log_probs, 0 outside the mask, where an overflow would make NaN (inf * 0)."""
    return torch.where(mask, log_probs - old_log_probs, 0.0)


def _masked(loss: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, loss, 0.0)


def _share(condition: Tensor, mask: Tensor) -> float:
    return float(masked_mean(condition.float(), mask))
