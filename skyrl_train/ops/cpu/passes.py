"""c/passes.c, compiled once per type of numbers where there is a C compiler.

An update has many small operations between its matmuls. As chains of torch operations each reads and writes all of
memory several times; together they took longer than the matmuls.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.base import AdamWSettings, MasterWeight
from skyrl_train.ops.cpu.c_library import NoCompiler, compiled_library

SOURCE = Path(__file__).with_name("c") / "passes.c"
SIDE = 32  # of the blocks that AMX multiplies, as in tiles.h: a head must be so many numbers, or a multiple
_POINTER, _INT, _FLOAT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
_ARGUMENTS = {
    "norm": [_POINTER] * 2 + [_FLOAT, _POINTER, _LONG, _INT],
    "norm_backward": [_POINTER] * 3 + [_FLOAT] + [_POINTER] * 3 + [_LONG, _INT],
    "rotate": [_POINTER] * 4 + [_FLOAT, _LONG, _INT, _INT],
    "swiglu": [_POINTER] * 3 + [_LONG],
    "swiglu_backward": [_POINTER] * 5 + [_LONG],
    "logprobs": [_POINTER] * 2 + [_FLOAT] + [_POINTER] * 3 + [_LONG, _INT],
    "logprobs_backward": [_POINTER] * 2 + [_FLOAT] + [_POINTER] * 4 + [_LONG, _INT],
    "square_sum": [_POINTER, _LONG],
    "dither": [_POINTER] * 2 + [_LONG] * 2,
    "adamw": [_POINTER] * 5 + [_FLOAT] * 8 + [_LONG],
}
_OF_TILES = {
    "request_tiles": [],
    "attend": [_POINTER] * 6,
    "attend_backward": [_POINTER] * 2 + [_LONG] + [_POINTER] * 9,
}
_RESULTS = {
    "attend": _INT,
    "attend_backward": _INT,
    "norm_backward": _INT,
    "square_sum": ctypes.c_double,
    "request_tiles": _INT,
}


class AttentionShape(ctypes.Structure):
    """`shape` of attention.h."""

    _fields_ = (
        ("bounds", _POINTER),
        ("before", _POINTER),
        *((name, _LONG) for name in ("segments", "heads", "kv_heads", "size")),
        ("scale", _FLOAT),
        ("window", _LONG),
    )


_compiling = Lock()


def passes_for(dtype: torch.dtype) -> Passes | None:
    """Return the compiled operations of this type; None: the type is another, or this machine has no C compiler."""
    with _compiling:  # a second caller waits for the first
        return _compiled(dtype)


def compile_ahead(dtype: torch.dtype) -> None:
    """Begin to compile in a thread, which takes a second, while something else is loaded."""
    Thread(target=passes_for, args=(dtype,), name="compile kernels", daemon=True).start()


@cache
def _compiled(dtype: torch.dtype) -> Passes | None:
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    try:
        return Passes(compiled_library(SOURCE, ["-DBFLOAT16"] if dtype == torch.bfloat16 else []), dtype)
    except NoCompiler:
        return None


class Passes:
    """The compiled operations on contiguous CPU tensors of one type; those called float are float32."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.library = library
        self._declare(_ARGUMENTS)
        self.has_tiles = hasattr(library, "attend")
        if self.has_tiles:
            self._declare(_OF_TILES)
            self.has_tiles = library.request_tiles() == 0

    def _declare(self, arguments: dict[str, list[Any]]) -> None:
        for name, types in arguments.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, _RESULTS.get(name)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return the RMSNorm over the last dimension."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        shape = x.numel() // x.shape[-1], x.shape[-1]
        self.library.norm(x.data_ptr(), weight.data_ptr(), epsilon, y.data_ptr(), *shape)
        return y

    def norm_backward(
        self, grad_y: Tensor, x: Tensor, weight: Tensor, epsilon: float, more: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of x, plus `more`, and that of the weight (float)."""
        grad_y = grad_y.contiguous()
        grad_x, grad_weight = torch.empty_like(grad_y), torch.zeros(weight.shape)
        failed = self.library.norm_backward(
            grad_y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            epsilon,
            None if more is None else more.data_ptr(),
            grad_x.data_ptr(),
            grad_weight.data_ptr(),
            x.numel() // x.shape[-1],
            x.shape[-1],
        )
        if failed:
            raise MemoryError(f"no memory for a gradient of {weight.numel()} numbers")
        return grad_x, grad_weight

    def rotated(self, x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
        """Rotate x [T, heads, D] by cosine and sine [T, D]; `back`: by the opposite angles, as its gradient is."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        pointers = x.data_ptr(), y.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        self.library.rotate(*pointers, -1.0 if back else 1.0, *x.shape)
        return y

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        self.library.swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up. Writes y over `grad_y`."""
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        pointers = (tensor.data_ptr() for tensor in (gate, up, grad_y, grad_gate, grad_up))
        self.library.swiglu_backward(*pointers, gate.numel())
        return grad_gate, grad_up

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops.logprobs`."""
        targets = targets.contiguous()
        logprobs, normalizers, entropies = (torch.empty(len(logits)) for _ in range(3))
        out = (tensor.data_ptr() for tensor in (normalizers, logprobs, entropies))
        self.library.logprobs(logits.data_ptr(), targets.data_ptr(), temperature, *out, *logits.shape)
        return logprobs, normalizers, entropies

    def logprobs_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        normalizers: Tensor,
        entropies: Tensor,
        grad_logprobs: Tensor,
        grad_entropies: Tensor | None,
    ) -> None:
        """See `Ops.logprobs_backward`."""
        targets = targets.contiguous()
        self.library.logprobs_backward(
            logits.data_ptr(),
            targets.data_ptr(),
            temperature,
            normalizers.data_ptr(),
            entropies.data_ptr(),
            grad_logprobs.data_ptr(),
            None if grad_entropies is None else grad_entropies.data_ptr(),
            *logits.shape,
        )

    def square_sum(self, x: Tensor) -> float:
        """Return the sum of squares of a float tensor, in an order that does not depend on the threads."""
        x = x.contiguous()
        return self.library.square_sum(x.data_ptr(), x.numel())

    def dither(self, x: Tensor, y: Tensor, first: int) -> None:
        """Write x (float) into y, rounded as `Ops.round_masters` says."""
        self.library.dither(x.data_ptr(), y.data_ptr(), x.numel(), first)

    def adamw(self, weight: MasterWeight, settings: AdamWSettings) -> None:
        """Move one master by one step, in one pass over memory, and write it into its parameter."""
        step, gradient = float(weight.step), weight.grad.contiguous()
        is_own = weight.parameter is weight.master
        self.library.adamw(
            weight.master.data_ptr(),
            weight.exp_avg.data_ptr(),
            weight.exp_avg_sq.data_ptr(),
            gradient.data_ptr(),
            None if is_own else weight.parameter.data_ptr(),
            settings.clip,
            settings.lr,
            settings.beta1,
            settings.beta2,
            settings.eps,
            settings.weight_decay,
            1 / (1 - settings.beta1**step),
            1 / (1 - settings.beta2**step),
            weight.master.numel(),
        )
