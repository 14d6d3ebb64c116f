"""The products of linear layers y = x W^T + b on a processor: in AMX tiles, see linear.h, if they fit; else torch's.

x is [T, inputs], y [T, outputs], of_y its gradient. Layers that share their input are computed together. What only
products read and write lies in blocks, [panels of 32 tokens, width / 32, 32, 32], the last tokens filled up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from skyrl_train.ops.cpu.passes import SIDE, Gate, Kernels, Layer, Matrix, kernels_of, kernels_with_tiles

FEWEST_ROWS = 32  # for fewer, laying out the weights takes longer than their product


def kernels_for_products(x: Tensor, weights: Sequence[Tensor]) -> Kernels | None:
    """x [T, width] or in blocks. None: these products are torch's."""
    kernels = kernels_with_tiles(x)
    if kernels is None or (x.ndim == 2 and len(x) < FEWEST_ROWS):
        return None
    fit = all(w.dtype == x.dtype and w.is_contiguous() and not any(size % SIDE for size in w.shape) for w in weights)
    return kernels if fit else None


def normed_for(x: Tensor, weight: Tensor, epsilon: float, weights: Sequence[Tensor]) -> Tensor:
    """RMSNorm of what goes into layers with these weights, [T, width]; in blocks if these are computed in tiles."""
    if (kernels := kernels_for_products(x, weights)) is None:
        return kernels_of(x).norm(x, weight, epsilon)
    y = _blocks_like(x, x.shape[1])
    kernels.library.norm_into_blocks(x.contiguous().data_ptr(), weight.data_ptr(), epsilon, byref(_matrix(y)), len(x))
    return y


def outputs(
    x: Tensor,
    num_tokens: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Each layer's y. Of one layer: plus `residual` [T, outputs], and written into `out` if given."""
    if (kernels := kernels_for_products(x, weights)) is None:
        if out is not None:
            torch.mm(x, weights[0].t(), out=out)
            return [out if biases[0] is None else out.add_(biases[0])]
        ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        if residual is not None:
            ys[0] += residual
        return ys
    ys = [x.new_empty((num_tokens, len(weight))) if out is None else out for weight in weights]
    _outputs(kernels, x, num_tokens, weights, biases, ys, residual, None)
    return ys


def gated_outputs(
    x: Tensor, num_tokens: int, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of a gate and of what it lets pass, and silu(gate) * up; in blocks if the kernels compute them."""
    if (kernels := kernels_for_products(x, weights)) is None:
        gate, up = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return gate, up, kernels_of(x).swiglu(gate, up)
    gate, up, gated = (_blocks_like(x, len(weights[0])) for _ in range(3))
    _outputs(kernels, x, num_tokens, weights, biases, [gate, up], None, gated)
    return gate, up, gated


def gradient_of_input(of_ys: Sequence[Tensor], num_tokens: int, weights: Sequence[Tensor]) -> Tensor:
    """The sum over layers of of_y W, [T, inputs]."""
    of_ys = [of_y.contiguous() for of_y in of_ys]
    if (kernels := kernels_for_products(of_ys[0], weights)) is None:
        of_x = of_ys[0] @ weights[0]
        for of_y, weight in zip(of_ys[1:], weights[1:], strict=True):
            of_x.addmm_(of_y, weight)
        return of_x
    of_x = of_ys[0].new_empty((num_tokens, weights[0].shape[1]))
    _gradient_of_input(kernels, of_ys, num_tokens, weights, _matrix(of_x), None)
    return of_x


def gradient_through_gate(of_y: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = gated W^T, of_y [T, outputs]: the gradients of gate and up, and gated once more, as gate and up lie."""
    of_y = of_y.contiguous()
    if gate.ndim == 2:
        gated = of_y @ weight  # its gradient, in whose place it comes itself
        of_gate, of_up = kernels_of(of_y).swiglu_backward(gate, up, gated)
        return of_gate, of_up, gated
    of_gate, of_up, gated = (torch.empty_like(gate) for _ in range(3))
    through = Gate(*map(_matrix, (gate, up, of_gate, of_up, gated)))
    _gradient_of_input(kernels_of(of_y), [of_y], len(of_y), [weight], through.gated, through)
    return of_gate, of_up, gated


def add_weight_gradients(
    kernels: Kernels, of_ys: Sequence[Tensor], x: Tensor, num_tokens: int, gradients: Sequence[tuple[Tensor, bool]]
) -> None:
    """gradient [outputs, inputs] float32 += of_y^T x of each layer, = instead of += where the gradient is new."""
    of_ys, x = [of_y.contiguous() for of_y in of_ys], x.contiguous()
    rows = zip(of_ys, gradients, strict=True)
    layers = [Layer(None, None, _matrix(of_y), gradient.data_ptr(), is_new) for of_y, (gradient, is_new) in rows]
    room = kernels.room(num_tokens, _width(x))
    kernels.library.gradients_of_weights(*_array(layers), byref(_matrix(x)), num_tokens, room.data_ptr())


def rows_of(x: Tensor, num_tokens: int) -> Tensor:
    """x [T, width], wherever it lies."""
    return x if x.ndim == 2 else x.transpose(1, 2).reshape(-1, _width(x))[:num_tokens]


def _outputs(
    kernels: Kernels,
    x: Tensor,
    num_tokens: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    residual: Tensor | None,
    gated: Tensor | None,
) -> None:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    layers = [
        Layer(weight.data_ptr(), None if bias is None else bias.data_ptr(), _matrix(y), None, False)
        for weight, bias, y in zip(weights, biases, ys, strict=True)
    ]
    more = (None if tensor is None else byref(_matrix(tensor)) for tensor in (residual, gated))
    room = kernels.room(num_tokens, _width(x))
    kernels.library.outputs(*_array(layers), byref(_matrix(x)), *more, num_tokens, room.data_ptr())


def _gradient_of_input(
    kernels: Kernels,
    of_ys: Sequence[Tensor],
    num_tokens: int,
    weights: Sequence[Tensor],
    of_x: Matrix,
    through: Gate | None,
) -> None:
    rows = zip(of_ys, weights, strict=True)
    layers = [Layer(weight.data_ptr(), None, _matrix(of_y), None, False) for of_y, weight in rows]
    room = kernels.room(num_tokens, of_x.width)
    kernels.library.gradient_of_input(
        *_array(layers), byref(of_x), None if through is None else byref(through), num_tokens, room.data_ptr()
    )


def _blocks_like(x: Tensor, width: int) -> Tensor:
    panels = -(-len(x) // SIDE) if x.ndim == 2 else len(x)
    return x.new_empty((panels, width // SIDE, SIDE, SIDE))


def _width(x: Tensor) -> int:
    return x.shape[1] * (1 if x.ndim == 2 else SIDE)


def _matrix(x: Tensor) -> Matrix:
    return Matrix(x.data_ptr(), _width(x), x.ndim == 4)


def _array(layers: list[Layer]) -> tuple[ctypes.Array[Layer], int]:
    return (Layer * len(layers))(*layers), len(layers)
