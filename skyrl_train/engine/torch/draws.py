"""The draw of a token, shared by every way of sampling: its row, its random number, and the inverse of the CDF.

A token's randomness is a function of (seed, position) alone, so what else the engine is doing does not change it. The
token is the inverse of the cumulative distribution at that number, which costs one pass over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skyrl_train.engine.base import SamplingParams

BLOCK = 128  # tokens whose probabilities are summed before the search: the search then looks at V / 128 + 128 numbers
MASK64 = (1 << 64) - 1
GAMMA = np.uint64(0x9E3779B97F4A7C15)
NOT_FINITE = "the policy's logits are not finite: its weights have diverged"


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence that needs its next token."""

    params: SamplingParams
    position: int  # of the token in its sequence
    tokens: Sequence[int]  # prompt and response so far: what the repetition penalty looks at
    banned: tuple[int, ...] = ()  # the end-of-sequence tokens while the response is shorter than min_tokens

    @property
    def is_plain(self) -> bool:
        """Nothing but a temperature and banned tokens decides."""
        params = self.params
        filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        return not filters and params.repetition_penalty == 1


def uniforms_of(rows: Sequence[Row]) -> list[float]:
    """Return the random number of each row's token."""
    seeds = np.array([row.params.seed & MASK64 for row in rows], dtype=np.uint64)
    return uniform(seeds, np.array([row.position for row in rows], dtype=np.uint64)).tolist()


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 32 random bits, from (seed, position) alone: SplitMix64 (Steele et al., 2014) twice."""
    states = _mix(seeds + GAMMA)
    return (_mix(states + GAMMA * (positions + np.uint64(1))) >> np.uint64(32)) / 2**32


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Modulo 2^64, which is how arrays multiply."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform * total; never a token of weight 0.

    weights [rows, vocab], uniforms [rows]. Searched in two steps, block then token, with float64 sums over the few
    numbers that matter. Weights that are not finite give some token of the vocabulary: the caller looks for them.
    """
    num_rows, vocab = weights.shape
    padded = -(-vocab // BLOCK) * BLOCK
    if padded != vocab:
        weights = torch.nn.functional.pad(weights, (0, padded - vocab))
    blocks = weights.view(num_rows, -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    # The block's float32 sum and this float64 one differ in the last bits: stay below the block's own end.
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-32))
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(1).clamp_max(vocab - 1)


def chosen(weights: Tensor, rows: list[Row]) -> Tensor:
    """The token of each row: the likeliest at temperature 0, else a draw in proportion to `weights`."""
    greedy = [row.params.temperature == 0 for row in rows]
    if all(greedy):
        return weights.argmax(-1)
    is_greedy, numbers = moved([greedy, uniforms_of(rows)], weights.device)
    drawn = inverse_cdf(weights, numbers)
    return torch.where(is_greedy > 0, weights.argmax(-1), drawn) if any(greedy) else drawn


def moved(numbers: Sequence[object], device: torch.device) -> Tensor:
    """Copy numbers to the device as float64, without waiting for it."""
    return sent(torch.tensor(numbers, dtype=torch.float64), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
