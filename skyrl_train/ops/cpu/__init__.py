"""The CPU's kernels, behind one door: `cpu_ops`."""

from skyrl_train.ops.cpu.cpu_ops import cpu_ops
from skyrl_train.ops.cpu.passes import compile_ahead

__all__ = ["compile_ahead", "cpu_ops"]
