"""Where the gradient of a weight is summed: with the weight's own, by autograd, or in float32, as it is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_train.learner.kernels import kernels_for


def sum_gradient_with(parameter: Tensor, master: Tensor) -> None:
    """From now on products add the parameter's gradient to `master.grad` if they can, and autograd gets none."""
    vars(parameter)["master"] = master


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """The gradient of one weight [out, in] of a product."""

    master: Tensor | None

    @classmethod
    def of(cls, weight: Tensor | None) -> WeightGradient:
        return cls(None if weight is None else vars(weight).get("master"))

    def add(self, of_y: Tensor, x: Tensor) -> Tensor | None:
        """The gradient of y = x W^T, of_y [T, out], x [T, in] -> what autograd is to add to W's: None if that is done."""
        kernels = kernels_for(of_y.dtype)
        if self.master is None or kernels is None or not kernels.can_sum(self.master):
            return of_y.t() @ x
        is_new = self.master.grad is None
        if self.master.grad is None:
            self.master.grad = torch.empty_like(self.master)
        kernels.add_weight_gradient(of_y, x, self.master.grad, is_new=is_new)
        return None
