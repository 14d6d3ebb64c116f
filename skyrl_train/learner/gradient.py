"""Forward and backward over a mini batch, in micro batches that fit the memory. They never show in the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_train.batch.packing import micro_batches
from skyrl_train.learner.objective import Objective
from skyrl_train.learner.weighted_metrics import WeightedMetrics
from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.model import Policy
from skyrl_train.spans import each_in_a_span, span
from skyrl_train.types import Batch


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that one forward pass may hold: tokens, and samples if limited."""

    max_tokens: int
    max_samples: int | None = None

    def cut(self, batch: Batch) -> list[Batch]:
        return micro_batches(batch, self.max_tokens, self.max_samples)


@torch.no_grad()
def logprobs_of(policy: Policy, batch: Batch, *, temperature: float, budget: Budget) -> Tensor:
    """Return the logprobs [T] on the batch's device, 0 wherever loss_mask is False."""
    parts = [
        batch_logprobs(policy, micro, temperature=temperature)[0].to(micro.input_ids.device)
        for micro in each_in_a_span("micro batch", budget.cut(batch), _size)
    ]
    return torch.cat(parts)


def accumulate_gradient(
    policy: Policy,
    objective: Objective,
    mini_batch: Batch,
    *,
    temperature: float,
    budget: Budget,
    generator: torch.Generator,
    on_tokens: Callable[[int], None],
) -> tuple[Tensor, WeightedMetrics]:
    """Add the gradient of the objective on a mini batch with loss_weights to the parameters.

    Returns the logprobs [T] of the forward pass, and metrics.
    """
    parts: list[Tensor] = []
    measured: list[WeightedMetrics] = []
    grad_logprobs: Tensor | None = None
    policy_loss = final_loss = 0.0
    if objective.is_of_whole_mini_batch:
        logprobs = logprobs_of(policy, mini_batch, temperature=temperature, budget=budget)
        grad_logprobs, policy_loss, metrics = gradient_of_logprobs(objective, mini_batch, logprobs, generator)
        measured.append(WeightedMetrics.of(metrics, int(mini_batch.loss_mask.sum())))
        final_loss = policy_loss
    start = 0
    for micro in each_in_a_span("micro batch", budget.cut(mini_batch), _size):
        here = micro.to(policy.device)
        logprobs, entropies = batch_logprobs(policy, micro, temperature=temperature, with_entropy=True)
        regularization, metrics = objective.regularization(here, logprobs, entropies)
        if grad_logprobs is None:
            loss, more = objective.policy_loss(here, logprobs, generator)
            metrics |= more
            detached_loss = loss.detach()
        else:
            own_part = grad_logprobs[start : start + micro.num_tokens]
            loss = (own_part.to(logprobs.device) * logprobs).sum()
            detached_loss = torch.zeros(())
        with span("backward"):
            (loss + regularization).backward()
        policy_loss += float(detached_loss)  # after backward was started: a GPU is waited for here
        final_loss += float(detached_loss) + float(regularization.detach())
        measured.append(WeightedMetrics.of(metrics, int(micro.loss_mask.sum())))
        parts.append(logprobs.detach().to(micro.input_ids.device))
        start += micro.num_tokens
        on_tokens(micro.num_tokens)
    losses = WeightedMetrics.of({"policy_loss": policy_loss, "final_loss": final_loss}, 1)
    return torch.cat(parts), WeightedMetrics.merged(*measured, losses)


def gradient_of_logprobs(
    objective: Objective, mini_batch: Batch, logprobs: Tensor, generator: torch.Generator
) -> tuple[Tensor, float, dict[str, float]]:
    """Return d policy loss / d logprobs [T], the policy loss, and the loss's metrics.

    With a loss that looks at all tokens at once the chain rule does the rest: sum(gradient * logprobs) has the gradient
    of the loss, micro batch by micro batch.
    """
    leaf = logprobs.detach().requires_grad_()
    loss, metrics = objective.policy_loss(mini_batch, leaf, generator)
    [gradient] = torch.autograd.grad(loss, leaf)
    return gradient, float(loss.detach()), metrics


def _size(batch: Batch) -> dict[str, int]:
    return {"samples": batch.num_samples, "tokens": batch.num_tokens}
