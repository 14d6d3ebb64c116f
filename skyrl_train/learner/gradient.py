"""Forward and backward over a mini batch, in pieces that fit the memory. The pieces never show in the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_train.batch.packing import micro_batches
from skyrl_train.learner.means import Means
from skyrl_train.learner.objective import Objective
from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.model import Policy
from skyrl_train.spans import each_in_a_span, span
from skyrl_train.types import Batch


@dataclass(frozen=True, slots=True)
class Budget:
    """What one forward pass may hold: tokens, and samples if limited."""

    max_tokens: int
    max_samples: int | None = None

    def cut(self, batch: Batch) -> list[Batch]:
        return micro_batches(batch, self.max_tokens, self.max_samples)


@torch.no_grad()
def logprobs_of(policy: Policy, batch: Batch, *, temperature: float, budget: Budget) -> Tensor:
    """[T] on the batch's device, 0 wherever loss_mask is False."""
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
    means: Means,
    on_tokens: Callable[[int], None],
) -> Tensor:
    """Add the gradient of the objective on a mini batch with loss_weights to the parameters -> its logprobs [T]."""
    pull: Tensor | None = None
    policy_loss = final_loss = 0.0
    if objective.is_of_whole_mini_batch:
        old_pass = logprobs_of(policy, mini_batch, temperature=temperature, budget=budget)
        pull, policy_loss = _pull(objective, mini_batch, old_pass, generator, means)
        final_loss = policy_loss
    parts: list[Tensor] = []
    start = 0
    for micro in each_in_a_span("micro batch", budget.cut(mini_batch), _size):
        here = micro.to(policy.device)
        logprobs, entropies = batch_logprobs(policy, micro, temperature=temperature, with_entropy=True)
        rest, metrics = objective.regularization(here, logprobs, entropies)
        if pull is None:
            loss, more = objective.policy_loss(here, logprobs, generator)
            metrics |= more
            of_policy = loss.detach()
        else:
            loss = (pull[start : start + micro.num_tokens].to(logprobs.device) * logprobs).sum()
            of_policy = torch.zeros(())
        with span("backward"):
            (loss + rest).backward()
        policy_loss += float(of_policy)  # after backward was started: a GPU is waited for here
        final_loss += float(of_policy) + float(rest.detach())
        means.add(metrics, int(micro.loss_mask.sum()))
        parts.append(logprobs.detach().to(micro.input_ids.device))
        start += micro.num_tokens
        on_tokens(micro.num_tokens)
    means.add({"policy_loss": policy_loss, "final_loss": final_loss}, 1)
    return torch.cat(parts)


def _size(batch: Batch) -> dict[str, int]:
    return {"samples": batch.num_samples, "tokens": batch.num_tokens}


def _pull(
    objective: Objective, mini_batch: Batch, logprobs: Tensor, generator: torch.Generator, means: Means
) -> tuple[Tensor, float]:
    """For a loss which looks at all tokens at once: (d loss / d logprobs [T], loss).

    The chain rule does the rest: sum(pull * logprobs) has the gradient of the loss, micro batch by micro batch.
    """
    leaf = logprobs.requires_grad_()
    loss, metrics = objective.policy_loss(mini_batch, leaf, generator)
    [pull] = torch.autograd.grad(loss, leaf)
    means.add(metrics, int(mini_batch.loss_mask.sum()))
    return pull, float(loss.detach())
