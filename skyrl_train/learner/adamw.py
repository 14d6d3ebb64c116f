"""AdamW in one pass over memory: gradients clipped, masters moved and written into parameters of another type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.ops.cpu.passes import Kernels, kernels_for
from skyrl_train.ops.rounding import rounded


class AdamW(torch.optim.AdamW):
    """torch's, state and all, on pairs of a float32 master and its parameter, which may be the master itself."""

    def __init__(self, pairs: Sequence[tuple[Tensor, nn.Parameter]], **settings: Any) -> None:
        super().__init__([master for master, _ in pairs], fused=True, **settings)
        self._pairs = pairs
        self._kernels = _kernels_of(pairs)
        self.clip = 1.0  # a factor of all gradients

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # ty: ignore[incompatible-method-override]
        """Without the kernels of this machine, torch's own passes."""
        if self._kernels is None:
            if self.clip != 1:
                for master, _ in self._pairs:
                    if master.grad is not None:
                        master.grad.mul_(self.clip)
            super().step()
            self.copy_into_parameters()
            return
        [group] = self.param_groups
        for master, parameter in self._pairs:
            if master.grad is None:
                continue
            state = self.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["step"] += 1
            self._kernels.adamw(master, None if parameter is master else parameter, state, group, self.clip)

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients together."""
        gradients = [master.grad for master, _ in self._pairs if master.grad is not None]
        if self._kernels is None:
            return float(torch.nn.utils.get_total_norm(gradients))
        return math.sqrt(math.fsum(map(self._kernels.square_sum, gradients)))

    @torch.no_grad()
    def copy_into_parameters(self) -> None:
        """The masters as they are, see rounding.py."""
        for master, parameter in self._pairs:
            if parameter is not master:
                parameter.copy_(rounded(master, parameter.dtype))


def _kernels_of(pairs: Sequence[tuple[Tensor, nn.Parameter]]) -> Kernels | None:
    """Those for the type of all parameters; None: some are elsewhere, of another type or not contiguous."""
    dtypes = {parameter.dtype for _, parameter in pairs}
    if len(dtypes) != 1 or any(p.device.type != "cpu" or not p.is_contiguous() for _, p in pairs):
        return None
    return kernels_for(dtypes.pop())
