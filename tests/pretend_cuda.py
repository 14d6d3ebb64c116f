"""A device that calls itself cuda:0 but computes on the CPU, to test code paths of the engine for GPUs.

    with torch.no_grad(), PretendCuda():
        policy = tiny_policy(device="cuda")

Values are really computed, so results can be compared; an operation that mixes tensors of both devices is an error, as
on a GPU. It has no gradients, because autograd needs a real device, and tests nothing about kernels, streams, graphs or
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
FACTORIES = {torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}
LIKE = {torch.empty_like, torch.ones_like, torch.zeros_like}
AS_THEY_ARE = {
    "__get__",
    "__set__",
    "__len__",
    "__hash__",
    "detach",
    "dim",
    "is_floating_point",
    "numel",
    "size",
    "stride",
}


class OnCuda(Tensor):
    """A tensor on the pretended device. `host` is the CPU tensor with its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # ty: ignore[incompatible-method-override]

    @staticmethod
    def __new__(cls, host: Tensor) -> OnCuda:
        options: dict[str, Any] = {"dtype": host.dtype, "device": CUDA, "strides": host.stride()}
        made = torch.Tensor._make_wrapper_subclass(cls, host.shape, **options)
        made.host = host
        return made

    def __init__(self, host: Tensor) -> None:
        pass

    def __iter__(self) -> Iterator[Tensor]:
        return map(OnCuda, self.host)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # ty: ignore[incompatible-method-override]
        """Run an operation that bypasses `PretendCuda`: views that torch makes internally."""
        return _wrapped(func(*tree_map(_host, args), **tree_map(_host, kwargs or {})), args)


class PretendEvent:
    """Stands for torch.cuda.Event: the pretended device has computed everything at once."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class PretendCuda(TorchFunctionMode):
    """Context in which every torch call of this thread computes on the pretended device."""

    def __enter__(self) -> Self:
        self._event = patch.object(torch.cuda, "Event", PretendEvent)
        self._event.start()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._event.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is torch._has_compatible_shallow_copy_type:
            return False  # makes Module.to create new parameters
        if func in FACTORIES or func in LIKE:
            return _made(func, args, kwargs)
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func in (Tensor.to, Tensor.cpu):
            return _moved(func, args, kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in AS_THEY_ARE or not any(isinstance(leaf, OnCuda) for leaf in leaves):
            return func(*args, **kwargs)
        if any(leaf.dim() and not isinstance(leaf, OnCuda) for leaf in leaves) and name not in ("copy_", "__getitem__"):
            raise RuntimeError(
                f"{name} got tensors on cuda:0 and on the host: {[tuple(leaf.shape) for leaf in leaves]}"
            )
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return _wrapped(func(*tree_map(_host, args), **tree_map(_host, kwargs)), (args, kwargs))


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    on_cuda = _is_cuda(kwargs.get("device")) if "device" in kwargs else func in LIKE and isinstance(args[0], OnCuda)
    kwargs.pop("pin_memory", None)
    host = func(*tree_map(_host, args), **{**kwargs, "device": "cpu"})
    return OnCuda(host) if on_cuda else host


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the result of Tensor.to(device or dtype) or Tensor.cpu()."""
    source, options = args[0], [*args[1:], *kwargs.values()]
    devices = [option for option in options if isinstance(option, torch.device | str)] or [source.device]
    dtypes = [option for option in options if isinstance(option, torch.dtype)] or [source.dtype]
    to_cuda = func is Tensor.to and _is_cuda(devices[0])
    if to_cuda == isinstance(source, OnCuda) and dtypes[0] == source.dtype and not kwargs.get("copy"):
        return source
    moved = _host(source).to(dtypes[0], copy=True)
    return OnCuda(moved) if to_cuda else moved


def _is_cuda(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, OnCuda) else leaf


def _wrapped(out: Any, given: Any) -> Any:
    """Return the outputs as device tensors; an in-place operation returns the tensor that it was given."""
    known = {id(leaf.host): leaf for leaf in tree_leaves(given) if isinstance(leaf, OnCuda)}
    return tree_map(lambda leaf: known.get(id(leaf), OnCuda(leaf)) if type(leaf) is Tensor else leaf, out)
