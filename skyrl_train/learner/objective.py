"""The loss: the policy loss plus the KL to the reference minus the entropy, per token, then weighted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.algorithms import PolicyLossRegistry
from skyrl_train.algorithms.kl import token_kl
from skyrl_train.algorithms.loss_style import LossCall, LossReturns, LossStyle, loss_style
from skyrl_train.algorithms.masked import masked_mean, masked_std
from skyrl_train.algorithms.off_policy import importance_weights, outlier_mask, ratio_metrics, sequence_mask, token_mask
from skyrl_train.algorithms.trial import tried
from skyrl_train.types import Batch
from skyrl_train.users_functions import name_of

if TYPE_CHECKING:
    from skyrl_train.config import AlgorithmConfig

Metrics = dict[str, float]


MAX_REPORTED_TURNS = 8


@dataclass(frozen=True)
class Objective:
    """The loss of trainer.algorithm, on batches with loss_weights. Every term is a weighted sum over tokens."""

    algorithm: AlgorithmConfig

    @cached_property
    def function(self) -> Callable[..., Any]:
        return PolicyLossRegistry.get(self.algorithm.policy_loss_type)

    @cached_property
    def style(self) -> LossStyle:
        """Return how the loss is called; a user's is tried once. ValueError if it returns nothing to minimise."""
        settings = self._settings(torch.Generator().manual_seed(0))
        style = tried(f"the policy loss {name_of(self.function)}", lambda: loss_style(self.function, settings))
        if style.returns is not LossReturns.TOKENS and self.algorithm.off_policy_correction.is_on:
            raise ValueError(
                f"trainer.algorithm.policy_loss_type={self.algorithm.policy_loss_type} returns one number, so its "
                "tokens cannot be corrected; drop trainer.algorithm.off_policy_correction "
                "(the loss itself may use rollout_logprobs), or return one loss per token"
            )
        return style

    @property
    def needs_reference(self) -> bool:
        return self.uses_kl or self.algorithm.use_kl_in_reward or self.algorithm.distills

    @property
    def uses_kl(self) -> bool:
        return self.algorithm.use_kl_loss and self.algorithm.kl_loss_coef > 0

    @property
    def is_regularized(self) -> bool:
        """Return whether a term beside the policy loss has a weight, and so a gradient without advantages."""
        return self.uses_kl or (self.algorithm.use_entropy_loss and self.algorithm.entropy_loss_coef != 0)

    @property
    def rejects_samples(self) -> bool:
        """Return whether samples or tokens may be dropped by how far old_logprobs are from rollout_logprobs."""
        return self.algorithm.off_policy_correction.rejects

    @property
    def is_of_whole_mini_batch(self) -> bool:
        return self.style.returns is LossReturns.MEAN or getattr(self.function, "of_whole_mini_batch", False)

    def policy_loss(self, batch: Batch, logprobs: Tensor, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Return (the policy's term, metrics). Without old_logprobs the policy has not moved since the old ones."""
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        style = self.style
        given = scaled_by_loss_weights(batch) if style.returns is LossReturns.SUM else batch
        call = LossCall(self.function, given, logprobs, old_logprobs, self._settings(generator))
        token_loss, metrics = call.padded() if style.is_padded else call.flat()
        shape = logprobs.shape if style.returns is LossReturns.TOKENS else ()
        if token_loss.shape != shape:
            raise ValueError(
                f"policy loss {self.algorithm.policy_loss_type!r} returned a loss of shape {list(token_loss.shape)} "
                f"for a batch of {batch.num_tokens} tokens, and one of another kind when it was tried at the start"
            )
        if style.returns is not LossReturns.TOKENS:
            return token_loss, {f"loss_metrics/{name}": value for name, value in metrics.items()}
        weights, tis_metrics = self._importance_weights(batch, old_logprobs)
        metrics = {f"loss_metrics/{name}": float(value) for name, value in (metrics | tis_metrics).items()}
        return weighted_sum(token_loss if weights is None else token_loss * weights, batch), metrics

    def regularization(self, batch: Batch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Metrics]:
        """Return (coefficient * KL - coefficient * entropy, metrics)."""
        algorithm = self.algorithm
        total = logprobs.new_zeros(())
        metrics = {"policy_entropy": float(masked_mean(entropies.detach(), batch.loss_mask))}
        if self.uses_kl:
            if batch.ref_logprobs is None:
                raise ValueError("use_kl_loss needs ref_logprobs: call learner.add_logprobs first")
            kl = token_kl(logprobs, batch.ref_logprobs, batch.loss_mask, algorithm.kl_estimator_type)
            total = total + algorithm.kl_loss_coef * _masked_sum(kl, batch, batch.kl_weights)
            metrics["policy_kl"] = float(masked_mean(kl.detach(), batch.loss_mask))
        if algorithm.use_entropy_loss:
            total = total - algorithm.entropy_loss_coef * _masked_sum(entropies, batch, batch.entropy_weights)
        return total, metrics

    def without_rejected(self, batch: Batch) -> tuple[Batch, Metrics]:
        """Take the samples and tokens that drifted too far out of loss_mask. Call it before loss_weights are made."""
        if not self.rejects_samples:
            return batch, {}
        if batch.old_logprobs is None:
            raise ValueError("dropping off-policy samples needs old_logprobs: call learner.add_logprobs first")
        correction, rows = self.algorithm.off_policy_correction, batch.sample_index
        mask, metrics = outlier_mask(
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            rows,
            low=correction.outlier_token_is_threshold_low,
            high=correction.outlier_token_is_threshold_high,
        )
        mask, more = token_mask(
            batch.old_logprobs,
            batch.rollout_logprobs,
            mask,
            low=correction.token_mask_is_threshold_low,
            high=correction.token_mask_is_threshold_high,
        )
        metrics |= more
        metric = correction.sequence_mask_metric
        if metric is not None:
            prefix = "geo" if metric == "geometric" else "product"
            mask, more = sequence_mask(
                batch.old_logprobs,
                batch.rollout_logprobs,
                mask,
                rows,
                metric=metric,
                low=getattr(correction, f"{prefix}_mask_low"),
                high=getattr(correction, f"{prefix}_mask_high"),
            )
            metrics |= more
        return replace(batch, loss_mask=mask), {f"loss_metrics/{name}": value for name, value in metrics.items()}

    def drift_metrics(self, batch: Batch, old_logprobs: Tensor) -> Metrics:
        """Measure how far the learner's logprobs are from the engine's: same tokens, nearly the same weights."""
        difference = (old_logprobs - batch.rollout_logprobs).abs()
        metrics = {
            "rollout_train_logprobs_abs_diff_mean": float(masked_mean(difference, batch.loss_mask)),
            "rollout_train_logprobs_abs_diff_std": float(masked_std(difference, batch.loss_mask)),
        }
        if self.algorithm.off_policy_correction.is_on:
            ratios = ratio_metrics(old_logprobs, batch.rollout_logprobs, batch.loss_mask)
            metrics |= {f"loss_metrics/{name}": value for name, value in ratios.items()}
        return metrics

    def drift_by_turn(self, batch: Batch, old_logprobs: Tensor) -> Iterator[tuple[Metrics, int]]:
        """Yield the mean of the same difference for each of the first turns, with its number of tokens.

        Late turns stand on keys and values that the engine kept; a fault there would show as growth from turn to turn.
        """
        difference, turn = (old_logprobs - batch.rollout_logprobs).abs(), batch.turn_index
        for number in range(int(turn.max().clamp(max=MAX_REPORTED_TURNS))):
            here = batch.loss_mask & (turn == number + 1)
            name = f"rollout_train_logprobs_abs_diff_turn_{number + 1}"
            yield {name: float(masked_mean(difference, here))}, int(here.sum())

    def _settings(self, generator: torch.Generator) -> dict[str, Any]:
        """Return what a loss may ask for beside tensors: the values of the section and of those of single losses."""
        algorithm = self.algorithm
        sections = (algorithm, algorithm.sapo, algorithm.cispo, algorithm.clip_cov, algorithm.kl_cov, algorithm.dppo)
        values = {field.name: getattr(section, field.name) for section in sections for field in fields(section)}
        return {**values, "config": algorithm, "generator": generator}

    def _importance_weights(self, batch: Batch, old_logprobs: Tensor) -> tuple[Tensor | None, Metrics]:
        correction = self.algorithm.off_policy_correction
        level = correction.tis_ratio_type
        if level is None:
            return None, {}
        return importance_weights(
            old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            batch.sample_index,
            level=level,
            cap=getattr(correction, f"{level}_tis_ratio_clip_high"),
        )


def weighted_sum(token_values: Tensor, batch: Batch) -> Tensor:
    """Return sum(loss_weights * values) over the trained tokens."""
    return _masked_sum(token_values, batch, batch.loss_weights)


def _masked_sum(token_values: Tensor, batch: Batch, weights: Tensor | None) -> Tensor:
    """Return sum(weights * values) over the trained tokens; values elsewhere do not count, not even NaN."""
    if weights is None:
        raise ValueError("the batch has no loss_weights: use batch.packing.with_loss_weights on the whole mini batch")
    return (weights * torch.where(batch.loss_mask, token_values, 0.0)).sum()


def scaled_by_loss_weights(batch: Batch) -> Batch:
    """Return the batch with advantages * loss_weights: a masked sum over it is the loss, however it is cut."""
    if batch.loss_weights is None or batch.advantages is None:
        raise ValueError("the batch has no loss_weights or no advantages; both are made before the update")
    return replace(batch, advantages=batch.advantages * batch.loss_weights)
