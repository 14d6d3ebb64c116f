"""AdamW on float32 master weights, whatever type the model computes in, with a schedule and a guard on the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from skyrl_train.learner.adamw import AdamW
from skyrl_train.learner.adamw_8bit import AdamW8bit
from skyrl_train.learner.ranks import ONE_PROCESS, Ranks
from skyrl_train.learner.saved import Part, SavedLearner
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

    A float32 parameter is its own master; of a sharded one, the rows that this rank holds are. Any other parameter gets
    one: each backward adds its gradient to the master's in float32, and after a step the master is copied into the
    parameter. bfloat16 alone would lose updates below 1/256 of a weight.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        num_training_steps: int,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {}
        self._sharded: dict[str, nn.Parameter] = {}
        self._ranks = ranks
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, parameter in self.parameters.items():
            held = ranks.local(parameter)
            if held is not parameter:
                self._sharded[name] = parameter
            if held.dtype == torch.float32:
                self.masters[name] = held
            else:
                self.masters[name] = held.detach().float()
                MasterGradient(parameter, self.masters[name])
            pairs.append((self.masters[name], held))
        beta1, beta2 = config.adam_betas
        kind = AdamW8bit if config.optim == "adamw_8bit" else AdamW
        self._adamw = kind(pairs, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay)
        self._schedule = get_scheduler(config.scheduler, self._adamw, config.num_warmup_steps, num_training_steps)
        self._max_grad_norm = config.max_grad_norm

    @property
    def learning_rate(self) -> float:
        return float(self._adamw.param_groups[0]["lr"])

    def has_gradient(self) -> bool:
        """Return whether any number of any gradient is not zero, on any rank."""
        self._take_gradients()
        found = any(bool(master.grad.any()) for master in self.masters.values() if master.grad is not None)
        return any(self._ranks.gathered(found))

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self._sharded.values():
            parameter.grad = None

    def step(self, learning_rate: float | None = None) -> OptimizerStep:
        """Use the gradients that backward has left, and drop them. Every rank sees the norm of the whole gradient.

        learning_rate: of this step alone, which the schedule then does not count.
        """
        self._take_gradients()
        norm, [group] = self._norm(), self._adamw.param_groups
        is_finite, scheduled = math.isfinite(norm), self.learning_rate
        rate = scheduled if learning_rate is None else learning_rate
        if is_finite:
            self._adamw.clip = self._max_grad_norm / norm if 0 < self._max_grad_norm < norm else 1.0
            group["lr"] = rate
            self._adamw.step()
            group["lr"] = scheduled
            if learning_rate is None:
                self._schedule.step()
        self.zero_grad()
        return OptimizerStep(norm, rate, was_skipped=not is_finite)

    def forget_moments(self) -> None:
        """Begin with moments of zero, as before the first step. Weights and schedule stay."""
        self._adamw.state.clear()

    def parts(self) -> dict[str, Part]:
        """Return this rank's rows of masters and moments. They are live: save them before the next step."""
        parts = {}
        for name, kind, tensor in self._tensors():
            is_cut = tensor.shape == self.masters[name].shape  # scales are not, and then there is one rank
            parts[f"{kind}/{name}"] = Part(tensor, tuple((self.parameters[name] if is_cut else tensor).shape))
        return parts

    def plain_state(self) -> dict[str, Any]:
        """Return what else later steps depend on, as JSON can hold it."""
        return {
            "learning_rate": self.learning_rate,
            "steps": {name: self._adamw.num_steps(master) for name, master in self.masters.items()},
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def load(self, saved: SavedLearner) -> None:
        """Go on where the optimizer of `saved` stood. ValueError, and no change, if it is of another model."""
        self._refuse_other_model(saved)
        state = saved.plain["optimizer"]
        for name, kind, tensor in self._tensors():
            tensor.copy_(saved.part(f"{kind}/{name}", self._ranks))
        for name, master in self.masters.items():
            self._adamw.set_num_steps(master, state["steps"][name])
        self._adamw.param_groups[0]["lr"] = state["learning_rate"]
        self._schedule.load_state_dict(state["schedule"])
        self._adamw.copy_into_parameters()

    def _take_gradients(self) -> None:
        """Let the master of a sharded parameter have the gradient that the ranks have summed into the parameter."""
        for name, parameter in self._sharded.items():
            if parameter.grad is not None:
                self.masters[name].grad, parameter.grad = self._ranks.local(parameter.grad), None

    def _norm(self) -> float:
        """Return the 2-norm of all gradients of all ranks together."""
        norm = self._adamw.gradient_norm()
        if self._ranks.size == 1:
            return norm
        return math.sqrt(sum(part * part for part in self._ranks.gathered(norm)))

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name of the weight, kind, this rank's rows) of every master and every moment."""
        for name, master in self.masters.items():
            yield name, "masters", master
            yield from ((name, kind, tensor) for kind, tensor in self._adamw.saved(master).items())

    def _refuse_other_model(self, saved: SavedLearner) -> None:
        shapes = {
            name.removeprefix("masters/"): shape for name, shape in saved.shapes.items() if name.startswith("masters/")
        }
        if different := sorted(shapes.keys() ^ self.masters.keys()):
            raise ValueError(
                f"the checkpoint and the model differ in {len(different)} weights, e.g. {different[0]}: "
                "resume with the model that wrote the checkpoint"
            )
        for name, parameter in self.parameters.items():
            if shapes[name] != tuple(parameter.shape):
                raise ValueError(
                    f"the checkpoint's {name} is {list(shapes[name])}, the model's {list(parameter.shape)}: "
                    "resume with the model that wrote the checkpoint"
                )
