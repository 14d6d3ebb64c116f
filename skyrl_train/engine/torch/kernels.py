"""decode.c, compiled for one model when an engine is made: half a second, and only where there is a C compiler.

A decoding step has a dozen small operations between its matrix products. Through torch each costs more in starting than
in computing, and attention reads the cache once per operation; here they are four calls of C. The source is compiled
with the processor's own instructions for the model's own shapes. It shares torch's OpenMP threads: the library is
linked without OpenMP, so its calls find the runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("decode.c")
FREE_ORDER = (
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
)  # of a sum; NaN stays NaN
FLAGS = ("-O3", "-march=native", *FREE_ORDER, "-fopenmp", "-fPIC")
COMPILE_TIMEOUT_S = 60
_POINTER, _INT, _FLOAT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
_ARGUMENTS = {
    "rms_norm": [_POINTER] * 3 + [_FLOAT, _INT, _INT],
    "swiglu": [_POINTER] * 2 + [_INT, _INT],
    "rotate_and_store": [_POINTER] * 5 + [_FLOAT] + [_POINTER] * 3 + [_LONG, _INT],
    "draw": [_POINTER] * 4 + [_INT, _POINTER, _POINTER, _INT, _INT],
    "attend": [_POINTER] * 7 + [_LONG, _LONG, _FLOAT, _INT, _POINTER, _INT],
}
_NO_WINDOW = 2**31 - 1


class NoKernels(RuntimeError):
    """They cannot be compiled or loaded here, or not for this model."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the source is compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def definitions(self) -> list[str]:
        """Arguments of the compiler."""
        sizes = [f"-DHEADS={self.heads}", f"-DKV_HEADS={self.kv_heads}", f"-DHEAD_DIM={self.head_dim}"]
        return [*sizes, "-DBFLOAT16"] if self.dtype == torch.bfloat16 else sizes


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: its weight, which an update may change in place, and what it adds to the mean square."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """From a module of transformers."""
        return cls(module.weight.detach(), module.variance_epsilon)


class Kernels:
    """The compiled operations. All tensors are contiguous, on the processor and of the shape's type.

    NoKernels, with the reason, where they cannot be had.
    """

    def __init__(self, shape: Shape) -> None:
        if shape.dtype not in (torch.bfloat16, torch.float32) or shape.head_dim % 2 or shape.heads % shape.kv_heads:
            raise NoKernels(f"not written for {shape}")
        self._shape = shape
        self._library = _compiled(shape)

    def rms_norm(self, row: Tensor, norm: Norm) -> Tensor:
        """row [..., width], normed over its last dimension."""
        out = torch.empty_like(row)
        width = row.shape[-1]
        pointers = row.data_ptr(), norm.weight.data_ptr(), out.data_ptr()
        self._library.rms_norm(*pointers, norm.epsilon, row.numel() // width, width)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[T, 2 width] -> [T, width]"""
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
        """heads [T, heads + 2 kv_heads, D]: queries and keys are normed (where the model does) and rotated in place.

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
        slots: Tensor,
        positions: Tensor,
        twins: Tensor,
        shared: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """One new token of N sequences, in the first N rows of `heads`, over its slot's tokens up to its position.

        slots, positions, twins, shared [N] (int64) -> [N, heads, D]. The first `shared` tokens are read from slot
        `twin`, which holds the same, and from memory only once when sequences that have one twin are neighbours.
        """
        out = heads.new_empty((slots.shape[0], self._shape.heads, self._shape.head_dim))
        self._library.attend(
            heads.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            positions.data_ptr(),
            twins.data_ptr(),
            shared.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            scale,
            _NO_WINDOW if window is None else window,
            out.data_ptr(),
            slots.shape[0],
        )
        return out

    def draw(
        self, logits: Tensor, temperatures: list[float], uniforms: list[float], banned: list[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        """A token per row of logits [rows, vocab], in proportion to softmax(logits / temperature), and its logprob.

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


def _compiled(shape: Shape) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoKernels("there is no C compiler on the PATH")
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    with tempfile.TemporaryDirectory(prefix="skyrl-kernels-") as folder:
        unit, library = f"{folder}/decode.o", f"{folder}/decode.so"
        try:
            _run([*compiler.split(), *FLAGS, *wide, *shape.definitions, "-c", str(SOURCE), "-o", unit])
            _run([*compiler.split(), "-shared", unit, "-lm", "-o", library])
            loaded = ctypes.CDLL(library)
        except (OSError, subprocess.SubprocessError) as error:
            words = getattr(error, "stderr", None) or str(error)
            raise NoKernels(f"{compiler} cannot build {SOURCE.name}: {words.strip()}") from error
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _INT if name == "draw" else None
    return loaded


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
