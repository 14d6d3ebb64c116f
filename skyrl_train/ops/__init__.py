"""The operations of a device, chosen by `ops_for`: no code outside this folder knows a kernel or a compiler."""

from __future__ import annotations

import torch

from skyrl_train.ops.base import Ops
from skyrl_train.ops.cpu import compile_ahead, cpu_ops
from skyrl_train.ops.cuda import cuda_ops
from skyrl_train.ops.reference import Reference

__all__ = ["REFERENCE", "Ops", "ops_for", "prepare"]

REFERENCE = Reference()


def ops_for(device: torch.device, dtype: torch.dtype) -> Ops:
    """Return the fastest operations for tensors of this type on this device: the reference if there are no others."""
    if device.type == "cuda":
        return cuda_ops()
    if device.type == "cpu" and (ops := cpu_ops(dtype)) is not None:
        return ops
    return REFERENCE


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Begin what `ops_for` will need while something else is loaded: a CPU's kernels are compiled in a second."""
    if device.type == "cpu":
        compile_ahead(dtype)
