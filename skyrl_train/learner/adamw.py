"""AdamW whose steps are computed by ops/: gradients clipped, masters moved and written into their parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops import REFERENCE, Ops, ops_for
from skyrl_train.ops.base import AdamWSettings, MasterWeight

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW, state and all, on pairs of a float32 master and its parameter, which may be the master itself.

    All are plain tensors: a kernel reads and writes their memory.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], **settings: Any) -> None:
        super().__init__([master for master, _ in pairs], fused=True, **settings)
        self._pairs = pairs
        self._ops = _ops_of(pairs)
        self.clip = 1.0  # a factor of all gradients

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # ty: ignore[incompatible-method-override]
        [group] = self.param_groups
        beta1, beta2 = group["betas"]
        settings = AdamWSettings(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], self.clip)
        self._move([pair for pair in self._pairs if pair[0].grad is not None], settings)

    def _move(self, pairs: Sequence[tuple[Tensor, Tensor]], settings: AdamWSettings) -> None:
        weights = [
            MasterWeight(master, parameter, master.grad, **self.moments(master))
            for master, parameter in pairs
            if master.grad is not None
        ]
        self._ops.adamw(weights, settings)

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients together."""
        return self._ops.gradient_norm([master.grad for master, _ in self._pairs if master.grad is not None])

    @torch.no_grad()
    def copy_into_parameters(self) -> None:
        """Write the masters as they are, rounded, into their parameters."""
        for master, parameter in self._pairs:
            if parameter is not master:
                parameter.copy_(self._ops.rounded(master, parameter.dtype))

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return both moments of a master and its `step`, [] float32: how many steps they have seen."""
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return {name: state[name] for name in ("step", *MOMENTS)}

    def saved(self, master: Tensor) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint needs beside the master and `num_steps`."""
        moments = self.moments(master)
        return {kind: moments[kind] for kind in MOMENTS}

    def num_steps(self, master: Tensor) -> int:
        """Return how many steps the moments of a master have seen."""
        return int(self.moments(master)["step"])

    def set_num_steps(self, master: Tensor, num_steps: int) -> None:
        self.moments(master)["step"].fill_(num_steps)


def _ops_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Ops:
    """Return the operations for all parameters; the reference where they are on several devices or of several types."""
    kinds = {(parameter.device, parameter.dtype) for _, parameter in pairs}
    return ops_for(*kinds.pop()) if len(kinds) == 1 else REFERENCE
