"""The structures of decode.c, as ctypes has them. A pointer in one keeps nothing alive."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor


class Product(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "bias")),
        *((name, c_int) for name in ("inputs", "outputs", "gated")),
    )


class Tokens(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("slots", "positions", "twins", "shared"))


class CLayer(Structure):
    """`layer`"""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, Product) for name in ("query_key_value", "output", "gate_up", "down")),
        *((name, c_float) for name in ("attention_epsilon", "head_epsilon", "mlp_epsilon", "scale")),
        ("window", c_int),
    )


class Cache(Structure):
    _fields_ = (("keys", c_void_p), *((name, c_int64) for name in ("values", "layer", "slot", "head")))


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Rows that are one token each, all [N] (int64): its slot and position, and the slot (`twins`) that holds the first
    `shared` tokens as well: they are read there, so from memory only once when neighbours have one twin.
    """

    slots: Tensor
    positions: Tensor
    twins: Tensor
    shared: Tensor

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def struct(self) -> Tokens:
        return Tokens(*(of.data_ptr() for of in (self.slots, self.positions, self.twins, self.shared)))
