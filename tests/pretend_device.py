"""A device "pretend" that computes on the CPU, gradients included, to test the learner's code paths for other devices.

Importing this registers the device with torch permanently, so tests use it in a separate process. Host and device
tensors in one operation are an error, as on a GPU. pretend_cuda.py tests the code paths that only "cuda" has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
FACTORIES = {torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}


class OnDevice(Tensor):
    """A tensor on the device. `host` is the CPU tensor with its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # ty: ignore[incompatible-method-override]

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        options: dict[str, Any] = {"dtype": host.dtype, "device": torch.device("pretend", 0), "strides": host.stride()}
        made = torch.Tensor._make_wrapper_subclass(cls, host.shape, **options)
        made.host = host
        return made

    def __init__(self, host: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # ty: ignore[incompatible-method-override]
        kwargs, name = dict(kwargs or {}), str(func)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if "copy" not in name and any(leaf.dim() and not isinstance(leaf, OnDevice) for leaf in leaves):
            raise RuntimeError(f"{name} got tensors of both devices: {[tuple(leaf.shape) for leaf in leaves]}")
        to_host = "_to_copy" in name and "device" in kwargs and torch.device(kwargs["device"]).type == "cpu"
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        if to_host:
            return out
        known = {id(_host(leaf)): leaf for leaf in leaves}  # an in-place operation returns the tensor that it was given
        return tree_map(lambda leaf: known.get(id(leaf), OnDevice(leaf)) if type(leaf) is Tensor else leaf, out)


class PretendDevice(TorchFunctionMode):
    """Context that handles factories, moves, and two operations for which torch would need a kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._has_compatible_shallow_copy_type:
            return False  # makes Module.to create new parameters
        if func in FACTORIES and _is_pretended(kwargs.get("device")):
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.to and not isinstance(args[0], OnDevice):
            options = [*args[1:], *kwargs.values()]
            if any(map(_is_pretended, options)):
                dtypes = [option for option in options if isinstance(option, torch.dtype)]
                moved = args[0].detach().to(dtypes[0] if dtypes else args[0].dtype, copy=True)
                return OnDevice(moved).requires_grad_(args[0].requires_grad)
        if func in (torch.where, Tensor.where) and len(args) == 3 and isinstance(args[0], OnDevice):
            dtype = next(arg.dtype for arg in args[1:] if isinstance(arg, Tensor))
            args = tuple(arg if isinstance(arg, Tensor) else OnDevice(torch.tensor(arg, dtype=dtype)) for arg in args)
        if func is torch._C._nn.scaled_dot_product_attention and isinstance(args[0], OnDevice):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor:
    assert dropout_p == 0
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = OnDevice(torch.ones(scores.shape[-2:], dtype=torch.bool).tril())
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def _is_pretended(option: object) -> bool:
    return isinstance(option, torch.device | str) and torch.device(option).type == "pretend"


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, OnDevice) else leaf


def _empty(size: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("empty.memory_format", _empty, "PrivateUse1")
_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
