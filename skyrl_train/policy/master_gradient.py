"""Gradients of bfloat16 weights, accumulated in the float32 `grad` of their masters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MasterGradient:
    """The float32 gradient of a weight of another type, in `grad` of its float32 master."""

    def __init__(self, parameter: nn.Parameter, master: Tensor) -> None:
        self._master, self._buffer = master, torch.empty(0)
        vars(parameter)["master_gradient"] = self
        parameter.register_post_accumulate_grad_hook(self._take_over)

    @staticmethod
    def of(parameter: Tensor) -> MasterGradient | None:
        """Return that of a parameter; None: it has none."""
        return vars(parameter).get("master_gradient")

    def begin(self) -> tuple[Tensor, bool]:
        """Return the gradient and whether it is new: its numbers mean nothing yet and must be overwritten."""
        if self._master.grad is not None:
            return self._master.grad, False
        buffer = self._buffer if len(self._buffer) else torch.empty_like(self._master)
        if buffer.device.type == "cpu":  # there new memory costs as much as filling it
            self._buffer = buffer
        self._master.grad = buffer
        return buffer, True

    def _take_over(self, parameter: Tensor) -> None:
        """Add what autograd has accumulated in the parameter's own type."""
        if parameter.grad is None:
            return
        total, is_new = self.begin()
        total.copy_(parameter.grad) if is_new else total.add_(parameter.grad)
        parameter.grad = None


class Embed(torch.autograd.Function):
    """Maps ids [..., T] to rows of an embedding, [..., T, hidden]; backward adds to these of the master's gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, gradient: MasterGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.gradient = padding, gradient
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ids, grad_rows = ctx.saved_tensors[0].flatten(), grads[0].flatten(0, -2).float()
        if ctx.padding is not None:
            grad_rows.masked_fill_((ids == ctx.padding)[:, None], 0.0)
        total, is_new = ctx.gradient.begin()
        (total.zero_() if is_new else total).index_add_(0, ids, grad_rows)
        return None, None, None, None


class Head(torch.autograd.Function):
    """Maps x [T, in] to x W^T + b [T, out], written into `out` if given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if out is None:
            return F.linear(x, weight, bias)
        out = torch.mm(x, weight.t(), out=out.detach())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, grad_y = ctx.needs_input_grad, grads[0].contiguous()
        grad_x = grad_y @ weight if needs[0] else None
        return grad_x, grad_y.t() @ x if needs[1] else None, grad_y.sum(0) if needs[2] else None, None
