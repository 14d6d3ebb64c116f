"""A pass of the model on a GPU: attention in one flash call, and norm, rotary positions and gate in one kernel each.

Attention is torch's flash kernel for ragged rows, and one of ours while decoding. Norm, rotary positions and gate come
from liger-kernel (extra `cuda`); without it the modules of transformers compute them, in three times as many kernels.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from skyrl_train.ops.ragged import Ragged

HALF_TYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256  # of the flash kernel
FIRST_CAPABILITY = (8, 0)  # Ampere, likewise


@cache
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the attention below can run: bfloat16 or float16 on a GPU from Ampere on."""
    if not has_triton() or device.type != "cuda" or dtype not in HALF_TYPES or head_dim > MAX_HEAD_DIM or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, *, scale: float, window: int | None
) -> Tensor:
    """query [T, heads, D], key and value [K, kv_heads, D] -> [T, heads, D]: `ragged_attention` in one kernel.

    FlashAttention-2 (arXiv 2307.08691). Nothing is repeated for query heads that share a key head. This is the
    operation behind torch.nn.attention.varlen, which adds a custom operation that makes a random state at every call.
    """
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        ragged.query_offsets,
        ragged.key_offsets,
        ragged.max_queries,
        ragged.max_keys,
        0.0,  # dropout
        True,  # causal, aligned at the last query and the last key
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=ragged.num_keys,
    )[0]


@cache
def has_triton() -> bool:
    """Whether kernels can be written in Triton, which comes with torch's CUDA builds."""
    return find_spec("triton") is not None


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, num_keys: Tensor, length: int, *, scale: float, window: int | None
) -> Tensor:
    """query [rows, heads, D], keys and values [slots * length, kv_heads, D] -> [rows, heads, D], for `has_flash`.

    Row r sees the first num_keys[r] keys of slot r, or the last `window` of these.
    """
    from skyrl_train.ops import cuda_decode

    return cuda_decode.attend(query.contiguous(), keys, values, num_keys, length, scale=scale, window=window)


def write_rows(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """key, value [T, kv_heads, D] -> rows [T] of keys and values [N, kv_heads, D], for `has_flash`."""
    from skyrl_train.ops import cuda_decode

    cuda_decode.write(key.contiguous(), value.contiguous(), keys, values, rows)


@cache
def has_fused_blocks() -> bool:
    """Whether the library with the fused kernels is installed."""
    return has_triton() and find_spec("liger_kernel") is not None


def normed(x: Tensor, norm: Any) -> Tensor:
    """x [..., hidden] -> RMSNorm of it (arXiv 1910.07467, eq. 4), with the module's weight and epsilon."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # ty: ignore[import-not-found]

    return LigerRMSNormFunction.apply(x, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


def added_and_normed(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """x, residual [T, hidden] -> (RMSNorm of their sum, their sum)."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # ty: ignore[import-not-found]

    return LigerFusedAddRMSNormFunction.apply(x, residual, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query, key [T, heads, D], cos and sin [1, T, D] -> both with rotary positions (arXiv 2104.09864, eq. 34).

    Writes over query and key.
    """
    from liger_kernel.ops.rope import LigerRopeFunction  # ty: ignore[import-not-found]

    turned = LigerRopeFunction.apply(*(tensor[None].transpose(1, 2) for tensor in (query, key)), cos, sin)
    return turned[0].transpose(1, 2)[0], turned[1].transpose(1, 2)[0]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202, eq. 5). Backward writes the gradients over gate and up."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # ty: ignore[import-not-found]

    return LigerSiLUMulFunction.apply(gate, up)
