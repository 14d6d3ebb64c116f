"""Where the gradient of a weight is summed: with the weight's own, by autograd, or in float32, as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.ops.cpu.passes import SIDE, kernels_with_tiles
from skyrl_train.ops.cpu.products import (
    add_weight_gradients,
    gradient_of_input,
    outputs,
    rows_of,
)


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

    @staticmethod
    def add(
        places: Sequence[WeightGradient], of_ys: Sequence[Tensor], x: Tensor, num_tokens: int, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """From y = x W^T of layers that share x [T, in], of_y [T, out] -> what autograd is to add to each W's gradient.

        None: nothing, because it is not needed or because it is summed already.
        """
        kernels = kernels_with_tiles(x)
        for_autograd: list[Tensor | None] = []
        summed: list[tuple[Tensor, GradientSum]] = []
        for place, of_y, need in zip(places, of_ys, needed, strict=True):
            if place.sum is None or place.shape is None or kernels is None or any(n % SIDE for n in place.shape):
                pair = rows_of(of_y, num_tokens), rows_of(x, num_tokens)
                for_autograd.append(pair[0].t() @ pair[1] if need else None)
                continue
            for_autograd.append(None)
            if need:
                summed.append((of_y, place.sum))
        if summed and kernels is not None:
            gradients = [total.begin() for _, total in summed]
            add_weight_gradients(kernels, [of_y for of_y, _ in summed], x, num_tokens, gradients)
        return for_autograd


class Product(torch.autograd.Function):
    """x [T, in] -> x W^T + b [T, out], written into `out` if given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = WeightGradient.of(weight)
        [y] = outputs(x, len(x), [weight], [bias], out=None if out is None else out.detach())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, [of_y] = ctx.needs_input_grad, grads
        [of_weight] = WeightGradient.add([ctx.gradient], [of_y], x, len(x), [needs[1]])
        of_x = gradient_of_input([of_y], len(of_y), [weight]) if needs[0] else None
        return of_x, of_weight, of_y.sum(0) if needs[2] else None, None


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
