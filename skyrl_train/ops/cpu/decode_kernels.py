"""c/decode.c, compiled for one model when an engine is made: half a second, and only where there is a C compiler.

A decoding step has a dozen small operations between its matmuls. Through torch each costs more in starting than in
computing, and attention reads the cache once per operation; here they are five calls of C. On a CPU with AMX the
matmuls are C as well, and all layers of a step are one call.
"""

from __future__ import annotations

import ctypes
from ctypes import Array, byref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.base import RowTokens
from skyrl_train.ops.cpu.c_library import NoCompiler, compiled_library
from skyrl_train.ops.cpu.c_structs import Cache, CLayer, CLinear, tokens_struct

SOURCE = Path(__file__).with_name("c") / "decode.c"
_POINTER, _INT, _FLOAT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
_ARGUMENTS = {
    "rms_norm": [_POINTER] * 3 + [_FLOAT, _INT, _INT],
    "swiglu": [_POINTER] * 2 + [_INT, _INT],
    "rotate_and_store": [_POINTER] * 5 + [_FLOAT] + [_POINTER] * 3 + [_LONG, _INT],
    "draw": [_POINTER] * 4 + [_INT, _POINTER, _POINTER, _INT, _INT],
    "attend": [_POINTER] * 4 + [_LONG, _LONG, _FLOAT, _INT, _POINTER, _INT],
    "linear": [_POINTER] * 4 + [_INT],
    "decode": [_POINTER, _INT] + [_POINTER] * 10 + [_INT],
    "request_tiles": [],
}
_RETURN_INT = {"draw", "request_tiles"}
NO_WINDOW = 2**31 - 1


class NoKernels(RuntimeError):
    """The kernels cannot be compiled or loaded here, or not for this model."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The head shape and type that the source is compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def definitions(self) -> list[str]:
        """Return arguments of the compiler."""
        sizes = [f"-DHEADS={self.heads}", f"-DKV_HEADS={self.kv_heads}", f"-DHEAD_DIM={self.head_dim}"]
        return [*sizes, "-DBFLOAT16"] if self.dtype == torch.bfloat16 else sizes


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: its weight, which an update may change in place, and what it adds to the mean square."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Return that of a module of transformers."""
        return cls(module.weight.detach(), module.variance_epsilon)


class DecodeKernels:
    """The compiled operations. All tensors are contiguous, on the CPU and of the shape's type.

    Raises NoKernels, with the reason, where they cannot be had.
    """

    def __init__(self, shape: Shape) -> None:
        if shape.dtype not in (torch.bfloat16, torch.float32) or shape.head_dim % 2 or shape.heads % shape.kv_heads:
            raise NoKernels(f"not written for {shape}")
        self._shape = shape
        try:
            self._library = _loaded(shape)
        except NoCompiler as error:
            raise NoKernels(str(error)) from error
        self.has_tiles = self._library.request_tiles() == 0  # of AMX

    def rms_norm(self, row: Tensor, norm: Norm) -> Tensor:
        """Return row [..., width], normed over its last dimension."""
        out = torch.empty_like(row)
        width = row.shape[-1]
        pointers = row.data_ptr(), norm.weight.data_ptr(), out.data_ptr()
        self._library.rms_norm(*pointers, norm.epsilon, row.numel() // width, width)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up of gate and up side by side: [T, 2 width] -> [T, width]."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        self._library.swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out

    def rotate_and_store(
        self,
        heads: Tensor,
        cosine: Tensor,
        sine: Tensor,
        norms: tuple[Norm, Norm] | None,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
    ) -> None:
        """Norm (where the model does) and rotate the queries and keys of heads [T, heads + 2 kv_heads, D] in place.

        cosine, sine [T, D]. Keys and values go to the cache, [slots, kv_heads, length, D], where `places` [T] (int64)
        counts in numbers from its beginning to the token of the first head.
        """
        query_norm, key_norm = (norm.weight.data_ptr() for norm in norms) if norms else (None, None)
        self._library.rotate_and_store(
            heads.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            query_norm,
            key_norm,
            norms[0].epsilon if norms else 0.0,
            keys.data_ptr(),
            values.data_ptr(),
            places.data_ptr(),
            keys.stride(1),
            heads.shape[0],
        )

    def attend(
        self,
        heads: Tensor,
        keys: Tensor,
        values: Tensor,
        tokens: RowTokens,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend with the first N rows of `heads` to their slots' tokens up to their own -> [N, heads, D]."""
        out = heads.new_empty((len(tokens), self._shape.heads, self._shape.head_dim))
        self._library.attend(
            heads.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            byref(tokens_struct(tokens)),
            keys.stride(0),
            keys.stride(1),
            scale,
            NO_WINDOW if window is None else window,
            out.data_ptr(),
            len(tokens),
        )
        return out

    def linear(self, layer: CLinear, rows: Tensor, out: Tensor, *, residual: Tensor | None = None) -> None:
        """Write (residual [T, outputs] +) rows [T, inputs] @ weights into out [T, outputs]. Needs tiles."""
        added = None if residual is None else residual.data_ptr()
        self._library.linear(byref(layer), rows.data_ptr(), added, out.data_ptr(), len(rows))

    def decode(
        self,
        layers: Array[CLayer],
        cache: Cache,
        tokens: RowTokens,
        places: Tensor,
        cosine: Tensor,
        sine: Tensor,
        row: Tensor,
        widest: int,
    ) -> None:
        """Compute all layers in place: row [T, hidden], each row one of `tokens`. Needs tiles.

        cosine, sine [T, D]; places [T] as in `rotate_and_store`; widest: the largest intermediate size.
        """
        shape, num_rows = self._shape, len(row)
        heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        buffers = [
            row.new_empty((num_rows, size)) for size in (row.shape[1], heads, shape.heads * shape.head_dim, widest)
        ]
        inputs = (tensor.data_ptr() for tensor in (places, cosine, sine, row, *buffers))
        self._library.decode(layers, len(layers), byref(cache), byref(tokens_struct(tokens)), *inputs, num_rows)

    def draw(
        self, logits: Tensor, temperatures: list[float], uniforms: list[float], banned: list[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        """Draw a token per row of logits [rows, vocab] from softmax(logits / temperature), and return its logprob too.

        Temperature 0 takes the likeliest. `banned` (row, token) are not drawn, but the logprobs count them in. A token
        -1: next to nothing was left. A logprob that is not finite: neither were the logits.
        """
        rows, vocab = logits.shape
        if any(not 0 <= token < vocab for _, token in banned):
            raise IndexError(f"banned tokens {sorted({token for _, token in banned})} of a vocabulary of {vocab}")
        tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
        heat, chance = torch.tensor(temperatures, dtype=torch.float32), torch.tensor(uniforms, dtype=torch.float64)
        bans = torch.tensor(banned, dtype=torch.int64)  # all of them named, for a pointer keeps nothing alive
        failed = self._library.draw(
            logits.data_ptr(),
            heat.data_ptr(),
            chance.data_ptr(),
            bans.data_ptr(),
            len(banned),
            tokens.data_ptr(),
            logprobs.data_ptr(),
            rows,
            vocab,
        )
        if failed:
            raise MemoryError(f"no memory for the probabilities of {vocab} tokens")
        return tokens.tolist(), logprobs.tolist()


def _loaded(shape: Shape) -> ctypes.CDLL:
    library = compiled_library(SOURCE, shape.definitions)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _INT if name in _RETURN_INT else None
    return library
