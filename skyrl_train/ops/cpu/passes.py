"""passes.c, compiled once per type of numbers, and only where there is a C compiler; else None stands for the kernels.

An update has many small operations between its matrix products. As chains of torch operations each reads and writes all
of memory several times; together they took longer than the products.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.cpu.c_library import NoCompiler, compiled_library

SOURCE = Path(__file__).with_name("c") / "passes.c"
SIDE = 32  # of the blocks that AMX multiplies; as in tiles.h
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
    "dither": [_POINTER] * 2 + [_LONG],
    "adamw": [_POINTER] * 5 + [_FLOAT] * 8 + [_LONG],
}
_OF_TILES = {
    "ask_for_tiles": [],
    "room_for": [_LONG] * 2,
    "outputs": [_POINTER, _LONG] + [_POINTER] * 3 + [_LONG, _POINTER],
    "gradient_of_input": [_POINTER, _LONG] + [_POINTER] * 2 + [_LONG, _POINTER],
    "gradients_of_weights": [_POINTER, _LONG, _POINTER, _LONG, _POINTER],
    "norm_into_blocks": [_POINTER] * 2 + [_FLOAT, _POINTER, _LONG],
    "attend": [_POINTER] * 6,
    "attend_backward": [_POINTER] * 2 + [_LONG] + [_POINTER] * 9,
}
_RESULTS = {
    "attend": _INT,
    "attend_backward": _INT,
    "norm_backward": _INT,
    "square_sum": ctypes.c_double,
    "ask_for_tiles": _INT,
    "room_for": _LONG,
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


class Matrix(ctypes.Structure):
    """`matrix` of linear.h."""

    _fields_ = (("at", _POINTER), ("width", _LONG), ("in_blocks", _LONG))


class Layer(ctypes.Structure):
    """`layer` of linear.h."""

    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("y", Matrix),
        ("gradient", _POINTER),
        ("is_new", _LONG),
    )


class Gate(ctypes.Structure):
    """`gate` of linear.h."""

    _fields_ = tuple((name, Matrix) for name in ("gate", "up", "of_gate", "of_up", "gated"))


_compiling = Lock()


def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """None: this type is another, or this machine has no C compiler."""
    with _compiling:  # whoever comes second waits for the first
        return _compiled(dtype)


def kernels_of(x: Tensor) -> Kernels:
    """Where only those come who have looked whether there are any."""
    kernels = kernels_for(x.dtype)
    assert kernels is not None
    return kernels


def kernels_with_tiles(x: Tensor) -> Kernels | None:
    """Those that can read x [..., width], or its blocks of 32 x 32, in tiles; None: there are none."""
    if x.device.type != "cpu" or x.shape[-1] % SIDE:
        return None
    kernels = kernels_for(x.dtype)
    return kernels if kernels is not None and kernels.has_tiles else None


def compile_beside(dtype: torch.dtype) -> None:
    """Begin the second that it takes while something else is loaded."""
    Thread(target=kernels_for, args=(dtype,), name="compile kernels", daemon=True).start()


@cache
def _compiled(dtype: torch.dtype) -> Kernels | None:
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    try:
        return Kernels(compiled_library(SOURCE, ["-DBFLOAT16"] if dtype == torch.bfloat16 else []), dtype)
    except NoCompiler:
        return None


class Kernels:
    """The compiled operations on contiguous tensors of one type on the processor; those called float are float32."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.library = library
        self._declare(_ARGUMENTS)
        self.has_tiles = hasattr(library, "room_for")
        if self.has_tiles:
            self._declare(_OF_TILES)
            self.has_tiles = library.ask_for_tiles() == 0
        self._room = torch.empty(0, dtype=dtype)

    def room(self, tokens: int, inputs: int) -> Tensor:
        """What the products of so many tokens want, of layers with so many inputs; kept for the next ones."""
        wanted = self.library.room_for(tokens, inputs)
        if len(self._room) < wanted:
            self._room = torch.empty(wanted, dtype=self.dtype)
        return self._room

    def _declare(self, arguments: dict[str, list[Any]]) -> None:
        for name, types in arguments.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, _RESULTS.get(name)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm over the last dimension."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        shape = x.numel() // x.shape[-1], x.shape[-1]
        self.library.norm(x.data_ptr(), weight.data_ptr(), epsilon, y.data_ptr(), *shape)
        return y

    def norm_backward(
        self, of_y: Tensor, x: Tensor, weight: Tensor, epsilon: float, more: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(gradient of x, plus `more`; gradient of the weight, float)."""
        of_y = of_y.contiguous()
        of_x, of_weight = torch.empty_like(of_y), torch.zeros(weight.shape)
        failed = self.library.norm_backward(
            of_y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            epsilon,
            None if more is None else more.data_ptr(),
            of_x.data_ptr(),
            of_weight.data_ptr(),
            x.numel() // x.shape[-1],
            x.shape[-1],
        )
        if failed:
            raise MemoryError(f"no memory for a gradient of {weight.numel()} numbers")
        return of_x, of_weight

    def rotated(self, x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
        """x [T, heads, D]; cosine, sine [T, D]. `back`: by the opposite angles, the way of the gradient."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        pointers = x.data_ptr(), y.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        self.library.rotate(*pointers, -1.0 if back else 1.0, *x.shape)
        return y

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        self.library.swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of gate, gradient of up); `of_y` becomes y."""
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        pointers = (tensor.data_ptr() for tensor in (gate, up, of_y, of_gate, of_up))
        self.library.swiglu_backward(*pointers, gate.numel())
        return of_gate, of_up

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """See softmax.statistics."""
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
        of_logprobs: Tensor,
        of_entropies: Tensor | None,
    ) -> None:
        """See softmax.into_gradient."""
        targets = targets.contiguous()
        self.library.logprobs_backward(
            logits.data_ptr(),
            targets.data_ptr(),
            temperature,
            normalizers.data_ptr(),
            entropies.data_ptr(),
            of_logprobs.data_ptr(),
            None if of_entropies is None else of_entropies.data_ptr(),
            *logits.shape,
        )

    def square_sum(self, x: Tensor) -> float:
        """Of a float tensor."""
        x = x.contiguous()
        return self.library.square_sum(x.data_ptr(), x.numel())

    def dither(self, x: Tensor, y: Tensor) -> None:
        """x float, into y, see rounding.py."""
        self.library.dither(x.data_ptr(), y.data_ptr(), x.numel())

    def adamw(
        self, master: Tensor, parameter: Tensor | None, state: dict[str, Tensor], group: dict[str, Any], clip: float
    ) -> None:
        """One step of torch's AdamW with these settings of its group, on clip * gradient, and into the parameter."""
        assert master.grad is not None
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        gradient = master.grad.contiguous()
        self.library.adamw(
            master.data_ptr(),
            state["exp_avg"].data_ptr(),
            state["exp_avg_sq"].data_ptr(),
            gradient.data_ptr(),
            None if parameter is None else parameter.data_ptr(),
            clip,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            1 / (1 - beta1**step),
            1 / (1 - beta2**step),
            master.numel(),
        )
