"""AdamW on float32 master weights, whatever type the model computes in, with a schedule and a guard on the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from skyrl_train.learner.adamw import AdamW
from skyrl_train.policy.master_gradient import MasterGradient

if TYPE_CHECKING:
    from skyrl_train.config import OptimizerConfig


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """The result of one optimizer step."""

    grad_norm: float  # before clipping
    learning_rate: float
    was_skipped: bool  # the gradient was not finite: weights, moments and schedule stayed as they were


class MasterOptimizer:
    """Owns the float32 masters of the trainable parameters and their float32 gradients.

    A float32 parameter is its own master. Any other parameter gets one: each backward adds its gradient to the master's
    in float32, and after a step the master is copied into the parameter. bfloat16 alone would lose updates below 1/256
    of a weight.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, num_training_steps: int
    ) -> None:
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float()
                MasterGradient(parameter, self.masters[name])
        beta1, beta2 = config.adam_betas
        pairs = [(self.masters[name], parameter) for name, parameter in self.parameters.items()]
        self._adamw = AdamW(pairs, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay)
        self._schedule = get_scheduler(config.scheduler, self._adamw, config.num_warmup_steps, num_training_steps)
        self._max_grad_norm = config.max_grad_norm

    @property
    def learning_rate(self) -> float:
        return float(self._adamw.param_groups[0]["lr"])

    def has_gradient(self) -> bool:
        """Return whether any number of any gradient is not zero."""
        return any(bool(master.grad.any()) for master in self.masters.values() if master.grad is not None)

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def step(self) -> OptimizerStep:
        """Use the gradients that backward has left, and drop them."""
        norm, learning_rate = self._adamw.gradient_norm(), self.learning_rate
        is_finite = math.isfinite(norm)
        if is_finite:
            self._adamw.clip = self._max_grad_norm / norm if 0 < self._max_grad_norm < norm else 1.0
            self._adamw.step()
            self._schedule.step()
        self.zero_grad()
        return OptimizerStep(norm, learning_rate, was_skipped=not is_finite)

    def state_dict(self) -> dict[str, Any]:
        """Return masters, moments and schedule. The tensors are live: save or copy them before the next step."""
        return {
            "masters": {name: master.detach() for name, master in self.masters.items()},
            "adamw": self._adamw.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        masters: dict[str, Tensor] = state["masters"]
        if masters.keys() != self.masters.keys():
            different = sorted(masters.keys() ^ self.masters.keys())
            raise ValueError(
                f"the checkpoint and the model differ in {len(different)} weights, e.g. {different[0]}: "
                "resume with the model that wrote the checkpoint"
            )
        for name, master in self.masters.items():
            if masters[name].shape != master.shape:
                raise ValueError(
                    f"the checkpoint's {name} is {list(masters[name].shape)}, the model's {list(master.shape)}: "
                    "resume with the model that wrote the checkpoint"
                )
        for name, master in self.masters.items():
            master.copy_(masters[name])
        self._adamw.load_state_dict(state["adamw"])
        self._schedule.load_state_dict(state["schedule"])
        self._adamw.copy_into_parameters()
