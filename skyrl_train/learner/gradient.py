"""Forward and backward over a mini batch, in passes that fit the memory. They never show in the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skyrl_train.learner.objective import Objective
from skyrl_train.learner.passes import Budget, Pass, passes
from skyrl_train.learner.ranks import ONE_PROCESS, Ranks
from skyrl_train.learner.weighted_metrics import WeightedMetrics
from skyrl_train.policy.model import Policy
from skyrl_train.spans import each_in_a_span, span
from skyrl_train.types import Batch


@torch.no_grad()
def logprobs_of(
    policy: Policy, batch: Batch, *, temperature: float, budget: Budget, ranks: Ranks = ONE_PROCESS
) -> Tensor:
    """Return the logprobs [T] on the batch's device, 0 wherever loss_mask is False."""
    logprobs, forward = _zeros(batch), ranks.forward(policy)
    for micro in each_in_a_span("micro batch", passes(batch, budget, ranks), _size):
        found, _ = forward(micro.batch, temperature=temperature)
        _put(logprobs, micro, found)
    return ranks.sum(logprobs)


def accumulate_gradient(
    policy: Policy,
    objective: Objective,
    mini_batch: Batch,
    *,
    temperature: float,
    budget: Budget,
    generator: torch.Generator,
    on_tokens: Callable[[int], None],
    ranks: Ranks = ONE_PROCESS,
) -> tuple[Tensor, WeightedMetrics]:
    """Add the gradient of the objective on a mini batch with loss_weights to the parameters.

    Returns the logprobs [T] of the forward pass, and metrics. Both are of the whole mini batch on every rank.
    """
    all_logprobs, forward = _zeros(mini_batch), ranks.forward(policy)
    measured: list[WeightedMetrics] = []
    grad_logprobs: Tensor | None = None
    policy_loss = final_loss = 0.0
    if objective.is_of_whole_mini_batch:
        logprobs = logprobs_of(policy, mini_batch, temperature=temperature, budget=budget, ranks=ranks)
        grad_logprobs, loss_of_all, metrics = gradient_of_logprobs(objective, mini_batch, logprobs, generator)
        if ranks.rank == 0:  # every rank has computed it; it counts once
            measured.append(WeightedMetrics.of(metrics, int(mini_batch.loss_mask.sum())))
            policy_loss = final_loss = loss_of_all
    for micro in each_in_a_span("micro batch", passes(mini_batch, budget, ranks), _size):
        here = micro.batch.to(policy.device)
        logprobs, entropies = forward(micro.batch, temperature=temperature, with_entropy=True)
        if micro.is_padding:
            ((logprobs.sum() + entropies.sum()) * 0.0).backward()
            on_tokens(micro.num_tokens)
            continue
        regularization, metrics = objective.regularization(here, logprobs, entropies)
        if grad_logprobs is None:
            loss, more = objective.policy_loss(here, logprobs, generator)
            metrics |= more
            detached_loss = loss.detach()
        else:
            loss = (grad_logprobs[micro.places].to(logprobs.device) * logprobs).sum()
            detached_loss = torch.zeros(())
        with span("backward"):
            (loss + regularization).backward()
        policy_loss += float(detached_loss)  # after backward was started: a GPU is waited for here
        final_loss += float(detached_loss) + float(regularization.detach())
        measured.append(WeightedMetrics.of(metrics, int(micro.batch.loss_mask.sum())))
        _put(all_logprobs, micro, logprobs.detach())
        on_tokens(micro.num_tokens)
    pieces = ranks.gathered((WeightedMetrics.merged(*measured), policy_loss, final_loss))
    losses = {"policy_loss": sum(piece[1] for piece in pieces), "final_loss": sum(piece[2] for piece in pieces)}
    metrics_of_all = WeightedMetrics.merged(*(piece[0] for piece in pieces), WeightedMetrics.of(losses, 1))
    return ranks.sum(all_logprobs), metrics_of_all


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


def _zeros(batch: Batch) -> Tensor:
    return torch.zeros(batch.num_tokens, device=batch.input_ids.device)


def _put(all_logprobs: Tensor, micro: Pass, logprobs: Tensor) -> None:
    if not micro.is_padding:
        all_logprobs[micro.places] = logprobs.to(all_logprobs.device)


def _size(micro: Pass) -> dict[str, int]:
    return {"samples": micro.batch.num_samples, "tokens": micro.batch.num_tokens}
