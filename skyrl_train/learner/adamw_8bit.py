"""AdamW with moments of 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"), by bitsandbytes.

Blocks of 256 numbers share a float32 scale, and each number is one of 256 values that lie denser near zero. Masters and
gradients stay float32, and the masters are rounded into their parameters as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from skyrl_train.learner.adamw import MOMENTS, AdamW
from skyrl_train.ops.base import AdamWSettings

BLOCK = 256  # numbers with one scale
FEWEST = 4096  # numbers: a smaller weight, such as a norm or a bias, keeps float32 moments
SCALES = "_scales"


class AdamW8bit(AdamW):
    """AdamW on the same pairs. A large weight's moments are codes of its shape, uint8, and a scale for each block."""

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return `step` and both moments; of a large weight {"exp_avg": codes, "exp_avg_scales": [blocks], ...}."""
        if not _is_large(master):
            return super().moments(master)
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for kind in MOMENTS:
                state[kind] = torch.zeros(master.shape, dtype=torch.uint8, device=master.device)
                state[kind + SCALES] = torch.zeros(-(-master.numel() // BLOCK), device=master.device)
        return dict(state)

    def saved(self, master: Tensor) -> dict[str, Tensor]:
        return {kind: tensor for kind, tensor in self.moments(master).items() if kind != "step"}

    def _move(self, pairs: Sequence[tuple[Tensor, Tensor]], settings: AdamWSettings) -> None:
        super()._move([pair for pair in pairs if not _is_large(pair[0])], settings)
        for master, parameter in pairs:
            if _is_large(master):
                self._move_large(master, settings)
                if parameter is not master:
                    parameter.copy_(self._ops.rounded(master, parameter.dtype))

    def _move_large(self, master: Tensor, settings: AdamWSettings) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        assert master.grad is not None
        state = self.moments(master)
        state["step"] += 1
        optimizer_update_8bit_blockwise(
            "adam",  # with decoupled decay
            master.grad,
            master,
            state["exp_avg"],
            state["exp_avg_sq"],
            settings.beta1,
            settings.beta2,
            0.0,
            0.0,
            settings.eps,
            int(state["step"]),
            settings.lr,
            _values("exp_avg", master.device),
            _values("exp_avg_sq", master.device),
            state["exp_avg" + SCALES],
            state["exp_avg_sq" + SCALES],
            settings.weight_decay,
            settings.clip,
        )


def _is_large(master: Tensor) -> bool:
    return master.numel() >= FEWEST


@cache
def _values(kind: str, device: torch.device) -> Tensor:
    """Return the 256 numbers from -1, or for squares from 0, to 1 that a code stands for."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=kind == "exp_avg").to(device)
