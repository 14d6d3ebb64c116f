"""The style of a policy loss: its layout and its return value, found by calling it on a small batch at start-up.

    returns    what it is                                   what is done with it
    TOKENS     one loss per token                           weighed by trainer.algorithm.loss_reduction and summed
    MEAN       SkyRL's scalar: a mean over the batch        called once on the whole mini batch, so that no cut shows
    SUM        a masked sum on advantages scaled before     called on advantages * loss_weights; the sums add up
A mean keeps its gradient when every sample is given twice, a sum doubles it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor

from skyrl_train.algorithms.padded import sample_rows
from skyrl_train.algorithms.registry import Function, call_with_named
from skyrl_train.algorithms.skyrl_style import FLAT_NAMES, is_ours, kind_of
from skyrl_train.algorithms.trial_batch import trial_batch
from skyrl_train.types import Batch
from skyrl_train.users_functions import WrongFunction, name_of, parameters_of

Metrics = dict[str, float]
WRONG_FOR_TENSORS = (RuntimeError, TypeError, ValueError, IndexError)  # errors of code that gets another shape or dtype


class LossReturns(StrEnum):
    """The kinds of loss that a policy loss may return beside its metrics."""

    TOKENS = "tokens"
    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class LossStyle:
    """is_padded: the tensors have the layout [samples, response tokens]. returns: the kind of loss."""

    is_padded: bool
    returns: LossReturns


@dataclass(frozen=True, slots=True)
class LossCall:
    """A policy loss with the values of all parameters that it may name."""

    function: Function
    batch: Batch  # with advantages
    log_probs: Tensor  # [T], with a gradient
    old_log_probs: Tensor  # [T]
    settings: dict[str, Any]

    def tensors(self) -> dict[str, Tensor | None]:
        return {
            "log_probs": self.log_probs,
            "old_log_probs": self.old_log_probs,
            "rollout_logprobs": None if self._lacks_rollout_logprobs else self.batch.rollout_logprobs,
            "advantages": self.batch.advantages,
            "loss_mask": self.batch.loss_mask,
        }

    @property
    def _lacks_rollout_logprobs(self) -> bool:
        """Return whether the samples came from a generator that did not keep rollout_logprobs."""
        return bool(self.batch.rollout_logprobs.isnan().any())

    def flat(self) -> tuple[Any, Metrics]:
        """Return the function's loss for our layout (one per token [T], or whatever it returned) and its metrics."""
        return self._answered({**self.tensors(), "sample_index": self.batch.sample_index})

    def padded(self) -> tuple[Any, Metrics]:
        """Return its loss for SkyRL's layout and its metrics; a loss per token is put back to [T]."""
        rows = sample_rows(self.batch)
        tensors = {name: None if x is None else rows.pad(x) for name, x in self.tensors().items()}
        mask = tensors["loss_mask"]
        assert mask is not None
        loss, metrics = self._answered({**tensors, "loss_mask": mask.float()})
        if isinstance(loss, Tensor) and tuple(loss.shape) == rows.shape:
            loss = rows.unpad(loss)
        return loss, metrics

    def _answered(self, tensors: dict[str, Any]) -> tuple[Any, Metrics]:
        offered = {**self.settings, **tensors}
        by_position = ("log_probs", "old_log_probs", "advantages")
        kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [p.name for p in parameters_of(self.function, name_of(self.function)) if p.kind in kinds]
        if not set(by_position) & set(parameters):  # SkyRL passes these three without their names
            offered |= {theirs: tensors[ours] for theirs, ours in zip(parameters[:3], by_position, strict=False)}
        answer = call_with_named(self.function, offered)
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise WrongFunction(
                f"the policy loss {name_of(self.function)} returned {kind_of(answer)}; it must return (loss, metrics)"
            )
        loss, metrics = answer
        if metrics is None:
            return loss, {}
        if not isinstance(metrics, dict):  # SkyRL's oldest form returns its clip ratio alone
            metrics = {"clip_ratio": metrics}
        return loss, {str(name): self._one_number(name, value) for name, value in metrics.items()}

    def _one_number(self, name: object, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise WrongFunction(
                f"the policy loss {name_of(self.function)} returned {kind_of(value)} as its metric {name!r}; it must "
                "be one number"
            ) from None


def loss_style(function: Function, settings: dict[str, Any]) -> LossStyle:
    """Find out how to call a policy loss. WrongFunction if it returns nothing that can be minimised.

    A loss of ours is flat, and so is one that asks for `sample_index`. Any other one gets SkyRL's padded tensors and,
    where those do not suit it, the flat ones.
    """
    if is_ours(function):
        return LossStyle(is_padded=False, returns=LossReturns.TOKENS)
    if FLAT_NAMES & {parameter.name for parameter in parameters_of(function, name_of(function))}:
        return _style_of_flat(function, settings)
    call = _trial_call(function, settings)
    try:
        loss, _ = call.padded()
    except WRONG_FOR_TENSORS as error:
        try:
            return _style_of_flat(function, settings)
        except WRONG_FOR_TENSORS:
            raise error from None
    if isinstance(loss, Tensor) and loss.shape == trial_batch().loss_mask.shape:
        _refuse_useless(loss, call)
        return LossStyle(is_padded=True, returns=LossReturns.TOKENS)
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return LossStyle(is_padded=True, returns=_mean_or_sum(function, settings))
    raise WrongFunction(
        f"the policy loss {name_of(function)} returned {kind_of(loss)} as its loss for log_probs "
        f"{list(sample_rows(trial_batch()).shape)} [samples, response tokens]; it must return one loss per token, of "
        "that shape, or one number: a mean over the batch or a masked sum"
    )


def _style_of_flat(function: Function, settings: dict[str, Any]) -> LossStyle:
    call = _trial_call(function, settings)
    loss, _ = call.flat()
    if not isinstance(loss, Tensor) or loss.shape != call.log_probs.shape:
        raise WrongFunction(
            f"the policy loss {name_of(function)} returned {kind_of(loss)} as its loss for log_probs "
            f"{list(call.log_probs.shape)}; one that asks for sample_index must return one loss per token, of that "
            "shape, and leave the reduction to trainer.algorithm.loss_reduction"
        )
    _refuse_useless(loss, call)
    return LossStyle(is_padded=False, returns=LossReturns.TOKENS)


def _mean_or_sum(function: Function, settings: dict[str, Any]) -> LossReturns:
    once, twice = _size_of_gradient(function, settings), _size_of_gradient(function, settings, copies=2)
    _refuse_size(once, function)
    if 0.75 < twice / once < 1.25:
        return LossReturns.MEAN
    scaled = _size_of_gradient(function, settings, advantage_scale=2.0)
    if 1.5 < twice / once < 2.5 and 1.9 < scaled / once < 2.1:
        return LossReturns.SUM
    raise WrongFunction(
        f"the policy loss {name_of(function)} returned one number that is neither a mean over the batch nor a masked "
        f"sum that scales with the advantages (twice the samples: {twice / once:.2f} times the gradient; twice the "
        f"advantages: {scaled / once:.2f} times); return one loss per token instead"
    )


def _size_of_gradient(
    function: Function, settings: dict[str, Any], *, copies: int = 1, advantage_scale: float = 1.0
) -> float:
    call = _trial_call(function, settings, copies=copies, advantage_scale=advantage_scale)
    loss, _ = call.padded()
    [gradient] = torch.autograd.grad(_gradient_of(loss, function), call.log_probs)
    return float(gradient.abs().sum())


def _refuse_useless(loss: Tensor, call: LossCall) -> None:
    """Raise WrongFunction for a loss per token [T] that would train nothing, or ruin the weights."""
    sampled = _gradient_of(loss, call.function)[call.batch.loss_mask].sum()
    [gradient] = torch.autograd.grad(sampled, call.log_probs)
    _refuse_size(float(gradient.abs().sum()), call.function)


def _refuse_size(size: float, function: Function) -> None:
    """Raise WrongFunction for a gradient of this size, summed over the tokens of the trial."""
    if size == 0:
        raise WrongFunction(
            f"the policy loss {name_of(function)} has a gradient of 0 everywhere: it would train nothing"
        )
    if not math.isfinite(size):
        raise WrongFunction(
            f"the policy loss {name_of(function)} has a gradient that is not finite on a small batch: an update "
            "with it is left out; a divisor may be 0, for example loss_mask at a token that was not sampled"
        )


def _gradient_of(loss: Tensor, function: Function) -> Tensor:
    """Return the gradient of the loss."""
    if not loss.requires_grad:
        raise WrongFunction(
            f"the policy loss {name_of(function)} has no gradient with respect to log_probs: it would train nothing; "
            "compute it without torch.no_grad() and without detach()"
        )
    return loss


def _trial_call(
    function: Function, settings: dict[str, Any], *, copies: int = 1, advantage_scale: float = 1.0
) -> LossCall:
    batch = trial_batch(copies)
    num_tokens = batch.num_tokens
    steps = torch.arange(num_tokens // copies).repeat(copies)
    log_probs = torch.where(batch.loss_mask, -0.5 - 0.1 * (steps % 5), 0.0).requires_grad_()
    old_log_probs = torch.where(batch.loss_mask, log_probs.detach() + 0.04 * (steps % 3 - 1), 0.0)
    advantages = torch.where(batch.loss_mask, advantage_scale * torch.where(steps % 4 == 0, -0.7, 1.0), 0.0)
    batch = replace(
        batch,
        advantages=advantages,
        rollout_logprobs=torch.where(batch.loss_mask, log_probs.detach() - 0.01, 0.0),
    )
    return LossCall(function, batch, log_probs, old_log_probs, settings)
