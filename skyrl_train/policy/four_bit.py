"""Frozen weights in 4 bits, as QLoRA has them (Dettmers et al. 2023, section 3), stored and read by bitsandbytes.

Blocks of 64 numbers share a scale, and each number is one of the 16 of NormalFloat; the scales are 8-bit numbers, 256
of which share a scale of their own. That is 4.13 bits a number. The linear layers of a policy are replaced in place,
under their old names: whoever reads a layer's `weight` gets the matrix that its 4 bits stand for, in the compute type.
Learner, engine and export therefore compute with the same numbers.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.config.validation import INSTALL_QUANTIZED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# It warns on CPUs with bfloat16 instructions that it did not fetch another library's kernel, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
BLOCK, SCALES_PER_BLOCK = 64, 256
BYTES_PER_NUMBER = 1 / 2 + 1 / BLOCK + 4 / (BLOCK * SCALES_PER_BLOCK)


class FourBitMatrix:
    """A matrix in 4 bits. Whoever reads it gets a new tensor; one layer's at a time is whole."""

    def __init__(self, matrix: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        # As one row of whole blocks: bitsandbytes 0.50.2 reads blocks that cross rows wrongly on a CPU.
        row = F.pad(matrix.detach().reshape(1, -1), (0, -matrix.numel() % BLOCK))
        self._numbers, self._scales = quantize_4bit(row, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")

    def whole(self) -> Tensor:
        """Return the matrix, rounded to 4 bits, in its old type."""
        from bitsandbytes.functional import dequantize_4bit

        row = dequantize_4bit(self._numbers, self._scales)
        return row.view(-1)[: self.shape.numel()].view(self.shape)

    @property
    def num_bytes(self) -> int:
        scales: Any = self._scales
        parts = self._numbers, scales.absmax, scales.state2.absmax
        return sum(part.numel() * part.element_size() for part in parts)


class FourBitLinear(nn.Linear):
    """A frozen linear layer whose weight is a FourBitMatrix: no parameter, and not in the module's state."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.matrix = FourBitMatrix(linear.weight.to(device))
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def weight(self) -> Tensor:  # ty: ignore[incompatible-property-override]
        return self.matrix.whole()

    def forward(self, input: Tensor) -> Tensor:
        out = _FrozenMatmul.apply(input, self.matrix)
        return out if self.bias is None else out + self.bias


class _FrozenMatmul(torch.autograd.Function):
    """Maps x [*, in] -> x W^T [*, out]. Backward reads the 4 bits again, so that no whole matrix is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FourBitMatrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.whole())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.matrix.whole(), None


def freeze_in_four_bits(module: PreTrainedModel, device: torch.device | str) -> None:
    """Replace every linear layer but the output head, one after the other: the device never holds the whole model.

    ValueError without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"weights in 4 bits need the package bitsandbytes: {INSTALL_QUANTIZED}")
    head, target = module.get_output_embeddings(), torch.device(device)
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            module.set_submodule(name, FourBitLinear(layer, target))


def four_bit_matrices(module: nn.Module) -> dict[str, FourBitMatrix]:
    """Full name of the layer -> its matrix; empty for a policy without any."""
    layers = {name: getattr(layer, "matrix", None) for name, layer in module.named_modules()}
    return {name: matrix for name, matrix in layers.items() if isinstance(matrix, FourBitMatrix)}
