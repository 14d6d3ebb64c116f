"""Imitation: an optimizer step of cross entropy on conversations, before the policy learns from rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from skyrl_train.batch.packing import with_loss_weights
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.learner.gradient import accumulate_gradient
from skyrl_train.learner.objective import Objective
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.learner.passes import Budget
from skyrl_train.learner.ranks import Ranks
from skyrl_train.policy.model import Policy
from skyrl_train.spans import span
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from skyrl_train.config import TrainerConfig

# cross_entropy is a mean over the trained tokens of the batch, and nothing else is added to it
IMITATION = Objective(AlgorithmConfig(policy_loss_type="cross_entropy", loss_reduction="token_mean", use_kl_loss=False))


def imitate(
    policy: Policy,
    optimizer: MasterOptimizer,
    trainer: TrainerConfig,
    batch: Batch,
    on_tokens: Callable[[int], None],
    generator: torch.Generator,
    ranks: Ranks,
) -> dict[str, float]:
    """Make one optimizer step at the rate trainer.sft.lr, and return metrics.

    The loss is -log p of the trained tokens at temperature 1, whatever the temperature of the sampling is: at that one
    the policy reproduces the conversations, and a lower one makes its replies surer.
    """
    optimizer.zero_grad()
    weighed = with_loss_weights(batch, "token_mean")
    budget = Budget(trainer.token_budget, trainer.micro_train_batch_size_per_gpu)
    _, measured = accumulate_gradient(
        policy,
        IMITATION,
        weighed,
        temperature=1.0,
        budget=budget,
        generator=generator,
        on_tokens=on_tokens,
        ranks=ranks,
    )
    with span("optimizer step"):
        step = optimizer.step(trainer.sft.lr)
    means = measured.means()
    return {
        "sft/loss": means["policy_loss"],
        "sft/entropy": means["policy_entropy"],
        "sft/num_trained_tokens": float(batch.loss_mask.sum()),
        "sft/lr": step.learning_rate,
        "sft/num_skipped_steps": float(step.was_skipped),
        **({} if step.was_skipped else {"policy/grad_norm": step.grad_norm}),
    }
