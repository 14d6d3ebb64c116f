"""A gradient that got lost between the loss and the weights: an error, told from gradients that are rightly zero."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from skyrl_train.learner.gradient import gradient_of_logprobs
from skyrl_train.learner.objective import Objective
from skyrl_train.types import Batch

SURE = 1e-6  # of a logprob: below, the policy is so sure of the token that its gradient may underflow
SMALL = 1e-10  # of d loss / d logprob; smaller ones may underflow on their way


class GradientLost(RuntimeError):
    """The loss pulls at the logprobs, but no weight has a gradient: a hook or a kernel is broken."""


def refuse_if_lost(objective: Objective, mini_batch: Batch, logprobs: Tensor, generator: torch.Generator) -> None:
    """Raise GradientLost if the gradient of a mini batch is zero in every weight and cannot rightly be.

    Rightly zero is a gradient where every token is clipped or has no advantage, where the policy gives every token
    probability one, and where samples with the same tokens have opposite advantages.
    """
    device = mini_batch.input_ids.device
    gradient, _, _ = gradient_of_logprobs(objective, mini_batch, logprobs.to(device), generator)
    can_move = mini_batch.loss_mask & (logprobs.to(device).abs() > SURE)
    sums = _sums_of_equal_tokens(mini_batch, torch.where(can_move, gradient, 0.0))
    num_pulled = sum(abs(total) > SMALL for total in sums)
    if num_pulled:
        raise GradientLost(
            f"the gradient of all weights is exactly zero, but the policy loss has one for {num_pulled} of "
            f"{int(mini_batch.loss_mask.sum())} trained tokens: it is lost in the backward pass of the model (a hook "
            "that is not called, or a kernel that writes nothing). The update would have changed nothing"
        )


def _sums_of_equal_tokens(batch: Batch, values: Tensor) -> list[float]:
    """Return the sum of the values of equal tokens behind equal tokens, in whichever samples they are."""
    sums: dict[int, float] = {}
    for start, end in pairwise(batch.offsets.tolist()):
        tokens_so_far = 0
        for token, value in zip(batch.input_ids[start:end].tolist(), values[start:end].tolist(), strict=True):
            tokens_so_far = hash((tokens_so_far, token))
            sums[tokens_so_far] = sums.get(tokens_so_far, 0.0) + value
    return list(sums.values())
