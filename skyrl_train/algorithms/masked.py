"""Statistics over masked tokens, and an exponential that cannot overflow."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values[mask], 0 where the mask is empty. Values outside the mask may be anything, also NaN."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """Return the population standard deviation of values[mask]."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask).sqrt()


def row_sums(values: Tensor, mask: Tensor, sample_index: Tensor, num_rows: int) -> Tensor:
    """Return [num_rows] the sum of the masked values of each row. values, mask, sample_index: [T]."""
    masked = torch.where(mask, values, 0.0)
    return masked.new_zeros(num_rows).index_add(0, sample_index, masked)


def safe_exp(x: Tensor) -> Tensor:
    """Return exp(x) in float32 with the exponent kept in [-20, 20]."""
    return x.float().clamp(-20.0, 20.0).exp()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) over the masked tokens (unbiased), 0 elsewhere and for a single token."""
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    variance = (centred**2).sum() / (mask.sum() - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)
