"""Where the gradient of a weight is summed: with the weight's own, by autograd, or in float32, as it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.learner.kernels import kernels_for


class GradientSum:
    """The float32 gradient of a weight of another type, in `grad` of its float32 master."""

    def __init__(self, parameter: nn.Parameter, master: Tensor) -> None:
        self._master, self._room = master, torch.empty(0)
        vars(parameter)["gradient_sum"] = self  # for WeightGradient
        parameter.register_post_accumulate_grad_hook(self._take_over)

    @staticmethod
    def of(parameter: Tensor) -> GradientSum | None:
        return vars(parameter).get("gradient_sum")

    def begin(self) -> tuple[Tensor, bool]:
        """(the sum, whether it is new: its numbers mean nothing yet and must be written over)."""
        if self._master.grad is not None:
            return self._master.grad, False
        room = self._room if len(self._room) else torch.empty_like(self._master)
        if room.device.type == "cpu":  # there new memory costs as much as filling it
            self._room = room
        self._master.grad = room
        return room, True

    def _take_over(self, parameter: Tensor) -> None:
        """What autograd has summed in the parameter's own type."""
        if parameter.grad is None:
            return
        total, is_new = self.begin()
        total.copy_(parameter.grad) if is_new else total.add_(parameter.grad)
        parameter.grad = None


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """The gradient of one weight [out, in] of a product."""

    sum: GradientSum | None
    shape: torch.Size | None

    @classmethod
    def of(cls, weight: Tensor | None) -> WeightGradient:
        """As long as nobody owns a sum for this weight, autograd gets its gradient."""
        return cls(None, None) if weight is None else cls(GradientSum.of(weight), weight.shape)

    def add(self, of_y: Tensor, x: Tensor) -> Tensor | None:
        """From y = x W^T, of_y [T, out] and x [T, in] -> what autograd is to add to W's: None if that is done."""
        kernels = kernels_for(of_y.dtype)
        if self.sum is None or self.shape is None or kernels is None or not kernels.can_sum(self.shape):
            return of_y.t() @ x
        total, is_new = self.sum.begin()
        kernels.add_weight_gradient(of_y, x, total, is_new=is_new)
        return None


class Product(torch.autograd.Function):
    """x [T, in] -> x W^T + b [T, out], written into `out` if given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = WeightGradient.of(weight)
        if out is None:
            return F.linear(x, weight, bias)
        torch.mm(x, weight.t(), out=out)
        return out.detach() if bias is None else out.detach().add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, [of_y] = ctx.needs_input_grad, grads
        of_weight = ctx.gradient.add(of_y, x) if needs[1] else None
        return of_y @ weight if needs[0] else None, of_weight, of_y.sum(0) if needs[2] else None, None


class Embedded(torch.autograd.Function):
    """ids [..., T] -> rows of the embedding. Backward adds to that many rows of the sum and makes none as large."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, place: GradientSum) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.place = padding, place
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ids, of_rows = ctx.saved_tensors[0].flatten(), grads[0].flatten(0, -2).float()
        if ctx.padding is not None:
            of_rows.masked_fill_((ids == ctx.padding)[:, None], 0.0)
        total, is_new = ctx.place.begin()
        (total.zero_() if is_new else total).index_add_(0, ids, of_rows)
        return None, None, None, None
