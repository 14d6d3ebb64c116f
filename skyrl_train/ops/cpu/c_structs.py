"""The structures of c/decode.c for ctypes. A pointer in one keeps nothing alive."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p

from torch import Tensor

from skyrl_train.ops.base import RowTokens


class CLinear(Structure):
    """`linear_layer` of decode_linear.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weights", "bias")),
        *((name, c_int) for name in ("inputs", "outputs", "gated")),
    )


class Tokens(Structure):
    """`tokens` of decode_attention.h."""

    _fields_ = tuple((name, c_void_p) for name in ("slots", "positions", "prefix_slots", "prefix_lengths"))


class CLayer(Structure):
    """`layer` of decode.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, CLinear) for name in ("query_key_value", "output", "gate_up", "down")),
        *((name, c_float) for name in ("attention_epsilon", "head_epsilon", "mlp_epsilon", "scale")),
        ("window", c_int),
    )


class Cache(Structure):
    """`cache` of decode.c."""

    _fields_ = (("keys", c_void_p), *((name, c_int64) for name in ("values", "layer", "slot", "head")))


def cache_struct(store: Tensor) -> Cache:
    """Describe a store [layers, keys and values, slots, kv_heads, length, D]."""
    strides = store.stride()
    return Cache(store.data_ptr(), *(strides[axis] for axis in (1, 0, 2, 3)))


def tokens_struct(rows: RowTokens) -> Tokens:
    """Point to the tensors of `rows`."""
    tensors = rows.slots, rows.positions, rows.prefix_slots, rows.prefix_lengths
    return Tokens(*(tensor.data_ptr() for tensor in tensors))
