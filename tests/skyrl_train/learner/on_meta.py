"""A pass of the learner as on a GPU, on tensors without memory: every operation real but those that only a GPU has.

Instead of the fused kernels stand what they allocate and keep. `LiveBytes` counts the memory that tensors would hold.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from skyrl_train.ops import cuda
from skyrl_train.policy import attention, blocks, logprobs
from skyrl_train.policy.attention import ATTENTION_NAME, register_attention
from skyrl_train.policy.model import Policy
from tests.benchmarks.shapes import SHAPES


class LiveBytes(TorchDispatchMode):
    """Bytes of storages on the meta device that are alive now, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if tensor.device.type != "meta" or key in self._seen:
            return
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, lambda _: self._freed(key, num_bytes))

    def _freed(self, key: int, num_bytes: int) -> None:
        del self._seen[key]
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


class Normed(torch.autograd.Function):
    """Of liger-kernel 0.8.5: keeps its input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grads[0]), torch.empty_like(ctx.saved_tensors[1])


class AddedAndNormed(torch.autograd.Function):
    """Likewise: keeps the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.empty_like(x)
        ctx.save_for_backward(total, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_x = torch.empty_like(grads[0])
        return grad_x, grad_x, torch.empty_like(ctx.saved_tensors[1])


class Gated(torch.autograd.Function):
    """Likewise: keeps gate and up, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


class OpsOnMeta(cuda.CudaOps):
    """The operations of a GPU without its softmax kernels' work."""

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        one, two, three = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
        return one, two, three

    def logprobs_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        normalizers: Tensor,
        entropies: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropies: Tensor | None,
    ) -> None:
        """Write in place."""


class FusedOpsOnMeta(OpsOnMeta):
    """The same with what liger-kernel's functions allocate and keep."""

    recomputes = True

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return Normed.apply(x, weight)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return AddedAndNormed.apply(x, residual, weight)

    def rotate(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        return query, key

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return Gated.apply(gate, up)


def as_on_a_gpu(patch: pytest.MonkeyPatch, logits_bytes: int, *, is_fused: bool = True) -> None:
    """Take the paths of a GPU. `logits_bytes`: of a chunk of logits; `is_fused`: with the library of fused kernels."""
    ops = FusedOpsOnMeta() if is_fused else OpsOnMeta()
    for room in (attention, blocks, logprobs):
        patch.setattr(room, "ops_for", lambda device, dtype: ops)
    patch.setattr(cuda, "has_flash", lambda device, dtype, head_dim: True)
    patch.setattr(logprobs, "_logits_per_chunk", lambda hidden: logits_bytes // hidden.itemsize)


def meta_module(shape: str, family: str = "qwen2") -> Any:
    """A model of this shape in bfloat16, as a run builds it before it has weights."""
    register_attention()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **SHAPES[shape]), dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
        )


def policy_of(module: Any, gradient_checkpointing: bool) -> Policy:
    blocks.replace_blocks(module)
    if gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(module, gradient_checkpointing)
