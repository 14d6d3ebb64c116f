"""Linear layers packed for matmuls of a few rows, which are bound by reading the weights.

Either layout is a second copy of the weights, packed again after each update. Layers that share their input are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.ops.cpu.c_structs import CLinear
from skyrl_train.ops.cpu.decode_kernels import DecodeKernels
from skyrl_train.ops.cpu.huge_pages import Buffers

WeightOf = Callable[[nn.Linear], Tensor]  # the matrix [out, in] that a layer multiplies by, its adapter included

PACKED_FOR_ROWS = 32  # the number of rows the layout is chosen for; others work as well


class PackedWeight(Protocol):
    """One matmul, x @ cat(weights).T + cat(biases), or the gate before the down projection, silu(gate(x)) * up(x)."""

    def pack(self) -> None:
        """Copy the weights again."""
        ...

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply: [T, inputs] -> [T, outputs]."""
        ...

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """Return residual [T, outputs] + self(rows)."""
        ...


def packed(
    linears: Sequence[nn.Linear],
    kernels: DecodeKernels | None,
    buffers: Buffers,
    weight_of: WeightOf,
    *,
    gated: bool = False,
) -> PackedWeight:
    """Pack layers for AMX tiles where the machine has them and the sizes fit, else in oneDNN's layout."""
    if kernels is not None and kernels.has_tiles and fits_tiles(linears, gated=gated):
        return TiledLinear(linears, kernels, buffers, weight_of, gated=gated)
    return PackedGate(linears, kernels, weight_of) if gated else PackedLinear(linears, weight_of)


def fits_tiles(linears: Sequence[nn.Linear], *, gated: bool) -> bool:
    outputs = [linear.out_features for linear in linears]
    whole = all(size % 16 == 0 for size in outputs) if gated else sum(outputs) % 32 == 0
    return whole and linears[0].in_features % 32 == 0


class PackedLinear:
    """Layers in the blocked layout that oneDNN reads fastest."""

    def __init__(self, linears: Sequence[nn.Linear], weight_of: WeightOf) -> None:
        self._linears, self._weight_of = linears, weight_of
        self._weight = self._bias = torch.empty(0)
        self.pack()

    def pack(self) -> None:
        weight = torch.cat([self._weight_of(linear) for linear in self._linears])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        biases = [linear.bias.detach() for linear in self._linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, self._weight, self._bias, "add")


class PackedGate(PackedLinear):
    """A gate and what it lets pass, with the activation behind them."""

    def __init__(self, linears: Sequence[nn.Linear], kernels: DecodeKernels | None, weight_of: WeightOf) -> None:
        super().__init__(linears, weight_of)
        self._kernels = kernels

    def __call__(self, rows: Tensor) -> Tensor:
        gate_up = super().__call__(rows)
        if self._kernels is not None:
            return self._kernels.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class TiledLinear:
    """Layers packed for AMX tiles, see c/decode_linear.h. Twice as fast as oneDNN for few rows."""

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        kernels: DecodeKernels,
        buffers: Buffers,
        weight_of: WeightOf,
        *,
        gated: bool = False,
    ) -> None:
        self._linears, self._kernels, self._weight_of, self._gated = linears, kernels, weight_of, gated
        inputs, outputs = linears[0].in_features, sum(linear.out_features for linear in linears)
        self._weight = buffers.zeros((outputs * inputs,), torch.bfloat16)
        self._bias = torch.zeros(outputs, dtype=torch.bfloat16) if _biases(linears) else None
        bias = None if self._bias is None else self._bias.data_ptr()
        self.struct = CLinear(self._weight.data_ptr(), bias, inputs, outputs, gated)
        self.pack()

    def pack(self) -> None:
        weight = self._by_panels([self._weight_of(linear) for linear in self._linears])
        panels, steps = weight.shape[0] // 32, weight.shape[1] // 32
        pairs = weight.view(torch.int32).view(panels, 2, 16, steps, 16)  # panel, tile, column, step, pair of inputs
        self._weight.view(torch.int32).view(panels, steps, 2, 16, 16).copy_(pairs.permute(0, 3, 1, 4, 2))
        if self._bias is not None:
            self._bias.copy_(self._by_panels(_biases(self._linears))[:, 0])

    def __call__(self, rows: Tensor) -> Tensor:
        outputs = self.struct.outputs // 2 if self._gated else self.struct.outputs
        out = rows.new_empty((len(rows), outputs))
        self._kernels.linear(self.struct, rows.contiguous(), out)
        return out

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        out = torch.empty_like(residual)
        self._kernels.linear(self.struct, rows.contiguous(), out, residual=residual.contiguous())
        return out

    def _by_panels(self, parts: list[Tensor]) -> Tensor:
        """Join parts [outputs, *]; a gate and what it lets pass by turns, 16 outputs each."""
        if self._gated:
            return torch.stack([part.view(-1, 16, part.shape[1]) for part in parts], 1).flatten(0, 2)
        return torch.cat(parts)


def _biases(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """Return [outputs, 1] for each layer, 0 for one without a bias; an empty list if no layer has one."""
    if all(linear.bias is None for linear in linears):
        return []
    parts = []
    for linear in linears:
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        parts.append(bias[:, None])
    return parts
