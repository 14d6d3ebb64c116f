"""The critic's half of the learner: values before an update, and the update that brings them nearer to the returns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.masked import masked_mean
from skyrl_train.algorithms.values import explained_variance, value_loss
from skyrl_train.batch.packing import mini_batches, with_loss_weights
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.learner.passes import Budget, passes
from skyrl_train.learner.ranks import ONE_PROCESS, Ranks
from skyrl_train.learner.saved import SavedLearner, ToSave
from skyrl_train.learner.weighted_metrics import WeightedMetrics
from skyrl_train.policy.value_head import Critic
from skyrl_train.spans import span
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from skyrl_train.config import TrainerConfig

FOLDER = "critic"  # inside the learner's own, in a checkpoint


class CriticLearner:
    """Holds the critic's master weights and its optimizer. It is called by the policy's learner, on the same ranks."""

    def __init__(
        self, critic: Critic, trainer: TrainerConfig, *, num_training_steps: int, ranks: Ranks = ONE_PROCESS
    ) -> None:
        self.critic = critic
        self._trainer, self._ranks = trainer, ranks
        steps_per_update = math.ceil(trainer.train_batch_size / trainer.critic_mini_batch_size)
        self._optimizer = MasterOptimizer(
            critic.trained,
            trainer.critic.optimizer_config,
            num_training_steps * steps_per_update * trainer.update_epochs_per_batch,
            ranks,
        )

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Return the values [T] on the batch's device, 0 wherever loss_mask is False."""
        values = torch.zeros(batch.num_tokens, device=batch.input_ids.device)
        forward = self._ranks.values_of(self.critic)
        budget = Budget(self._trainer.token_budget, self._trainer.micro_forward_batch_size_per_gpu)
        for micro in passes(batch, budget, self._ranks):
            found = forward(micro.batch)
            if not micro.is_padding:
                values[micro.places] = found.to(values.device)
        return self._ranks.sum(values)

    def mini_batches(self, batch: Batch) -> list[Batch]:
        """Return epochs x mini batches that have a trained token, one for each optimizer step of an update.

        They are weighed as SkyRL does it: the loss is a mean over samples of means over their tokens.
        """
        cut = mini_batches(batch, self._trainer.critic_mini_batch_size)
        weighed = [with_loss_weights(part, "sequence_mean") for part in cut if part.loss_mask.any()]
        return weighed * self._trainer.update_epochs_per_batch

    def update(self, batch: Batch, steps: list[Batch], on_tokens: Callable[[int], None]) -> dict[str, float]:
        """Train on a batch with values and returns; steps: its `mini_batches`.

        Return SkyRL's metrics, `critic/...`. Values and returns are those from before the update.
        """
        if batch.values is None or batch.returns is None:
            raise ValueError("a critic is trained on values and returns: call add_logprobs and add_advantages first")
        of_batch = {
            "values_mean": float(masked_mean(batch.values, batch.loss_mask)),
            "returns_mean": float(masked_mean(batch.returns, batch.loss_mask)),
            "explained_variance": explained_variance(batch.values, batch.returns, batch.loss_mask),
        }
        measured, outcomes = [WeightedMetrics.of(of_batch, 1)], Counter()
        for mini_batch in steps:
            measured.append(self._accumulate_gradient(mini_batch, on_tokens))
            with span("critic's optimizer step"):
                step = self._optimizer.step()
            outcomes[step.was_skipped] += 1
            rate = {"critic_lr": step.learning_rate}
            measured.append(WeightedMetrics.of(rate if step.was_skipped else {**rate, "grad_norm": step.grad_norm}, 1))
        counts = WeightedMetrics.of({"num_skipped_steps": float(outcomes[True])}, 1)
        return {f"critic/{name}": value for name, value in WeightedMetrics.merged(*measured, counts).means().items()}

    def to_save(self, folder: Path) -> ToSave:
        """Return masters, moments and schedule, for a folder of their own inside the learner's."""
        return ToSave(folder / FOLDER, self._optimizer.parts(), {"optimizer": self._optimizer.plain_state()})

    def load(self, folder: Path) -> None:
        self._optimizer.load(SavedLearner(folder / FOLDER))

    def close(self) -> None:
        self._optimizer.zero_grad()
        del self._optimizer

    def _accumulate_gradient(self, mini_batch: Batch, on_tokens: Callable[[int], None]) -> WeightedMetrics:
        self._optimizer.zero_grad()
        forward, measured, total = self._ranks.values_of(self.critic), [], 0.0
        budget = Budget(self._trainer.token_budget, self._trainer.micro_train_batch_size_per_gpu)
        for micro in passes(mini_batch, budget, self._ranks):
            here = micro.batch.to(self.critic.device)
            values = forward(micro.batch)
            if micro.is_padding:
                (values.sum() * 0.0).backward()
            else:
                loss, metrics = self._loss(here, values)
                loss.backward()
                total += float(loss.detach())
                measured.append(WeightedMetrics.of(metrics, int(here.loss_mask.sum())))
            on_tokens(micro.num_tokens)
        pieces = self._ranks.gathered((WeightedMetrics.merged(*measured), total))
        of_all = WeightedMetrics.of({"critic_loss": sum(loss for _, loss in pieces)}, 1)
        return WeightedMetrics.merged(*(metrics for metrics, _ in pieces), of_all)

    def _loss(self, batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the weighed sum of the losses of a micro batch, and metrics."""
        assert batch.values is not None
        assert batch.returns is not None
        assert batch.loss_weights is not None
        clip = self._trainer.algorithm.value_clip
        token_loss, metrics = value_loss(values, batch.values, batch.returns, batch.loss_mask, clip)
        return (batch.loss_weights * token_loss).sum(), metrics


def with_values(batch: Batch, critic: CriticLearner | None) -> Batch:
    """Return the batch with the critic's `values`, where there is one."""
    return batch if critic is None else replace(batch, values=critic.values(batch))
