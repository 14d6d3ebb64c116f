"""A pass of the model on a GPU: attention in one flash call, and norm, rotary positions and gate in one kernel each.

Attention is torch's flash kernel for ragged rows, and one of ours while decoding. Norm, rotary positions and gate come
from liger-kernel (extra `cuda`); without it the modules of transformers compute them, in three times as many kernels.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from skyrl_train.ops.base import PackedSegments, SegmentAttention
from skyrl_train.ops.bucketed_attention import bucketed_attention
from skyrl_train.ops.ragged import Ragged, RepeatedRows, gathered_keys, ragged_attention
from skyrl_train.ops.reference import Reference

HALF_TYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256  # of the flash kernel
FIRST_CAPABILITY = (8, 0)  # Ampere, likewise


@cache
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the attention below can run: bfloat16 or float16 on a GPU from Ampere on."""
    if not has_triton() or device.type != "cuda" or dtype not in HALF_TYPES or head_dim > MAX_HEAD_DIM or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, *, scale: float, window: int | None
) -> Tensor:
    """Compute `ragged_attention` in one kernel: query [T, heads, D], key and value [K, kv_heads, D] -> [T, heads, D].

    With pages, key and value are [pages, page size, kv_heads, D], the size a multiple of 256.

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
        block_table=ragged.pages,
    )[0]


@cache
def has_triton() -> bool:
    """Return whether Triton's kernels can run: it comes with torch's CUDA builds, and with vLLM where no GPU is."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, ragged: Ragged, *, scale: float, window: int | None
) -> Tensor:
    """Compute `ragged_attention` over pages: query [T, heads, D] -> [T, heads, D]."""
    attend = flash_attention if has_flash(query.device, query.dtype, query.shape[-1]) else ragged_attention
    return attend(query, keys, values, ragged, scale=scale, window=window)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, num_keys: Tensor, pages: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Attend with one new token per row: query [rows, heads, D] -> [rows, heads, D].

    keys, values [pages, page size, kv_heads, D]. Row r sees num_keys[r] keys, which fill the pages named in pages[r],
    or the last `window` of these.
    """
    if not has_flash(query.device, query.dtype, query.shape[-1]):
        ragged = Ragged.of([1] * len(query), num_keys.tolist(), query.device, pages)
        return ragged_attention(query, keys, values, ragged, scale=scale, window=window)
    from skyrl_train.ops import cuda_decode

    return cuda_decode.attend(query.contiguous(), keys, values, num_keys, pages, scale=scale, window=window)


def write_rows(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """Write key, value [T, kv_heads, D] into rows [T] of keys and values [N, kv_heads, D]."""
    if not has_flash(key.device, key.dtype, key.shape[-1]):
        keys.index_copy_(0, rows, key)
        values.index_copy_(0, rows, value)
        return
    from skyrl_train.ops import cuda_decode

    cuda_decode.write(key.contiguous(), value.contiguous(), keys, values, rows)


@cache
def has_fused_blocks() -> bool:
    """Return whether the library with the fused kernels is installed."""
    return has_triton() and find_spec("liger_kernel") is not None


@cache
def cuda_ops() -> Reference:
    """Return the operations for a GPU, with as many kernels as the installed libraries have."""
    if not has_triton():
        return CudaOps()
    return LigerOps() if has_fused_blocks() else TritonOps()


class CudaOps(Reference):
    """Attention of all segments in one kernel where there is one, the rest in plain torch."""

    def segment_attention(self, segments: PackedSegments, device: torch.device) -> SegmentAttention:
        return CudaAttention(segments, device)


class CudaAttention:
    """Implements `SegmentAttention`: one flash call, or segments of one length together where there is none."""

    def __init__(self, segments: PackedSegments, device: torch.device) -> None:
        self._segments, self._device = segments, device

    @cached_property
    def _gathered(self) -> tuple[Tensor | None, Ragged]:
        return gathered_keys(self._segments, self._device)

    @cached_property
    def _bucketed(self) -> SegmentAttention:
        return bucketed_attention(self._segments, self._device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        if not has_flash(query.device, query.dtype, query.shape[-1]):
            return self._bucketed(query, key, value, scale=scale, window=window)
        rows, ragged = self._gathered
        if rows is not None:
            key, value = RepeatedRows.apply(key, rows), RepeatedRows.apply(value, rows)
        return flash_attention(query, key, value, ragged, scale=scale, window=window)


class TritonOps(CudaOps):
    """Softmax of the head and rounding of weights in kernels of our own, which read and write once."""

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        if logits.stride(1) != 1:
            return super().logprobs(logits, targets, temperature)
        from skyrl_train.ops import cuda_kernels

        return cuda_kernels.statistics(logits, targets, temperature)

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
        given = (logits, targets, temperature, normalizers, entropies, grad_logprobs, grad_entropies)
        if logits.stride(1) != 1:
            super().logprobs_backward(*given)
            return
        from skyrl_train.ops import cuda_kernels

        cuda_kernels.into_gradient(*given)

    def round_masters(self, masters: Tensor, first: int = 0) -> Tensor:
        from skyrl_train.ops import cuda_kernels

        weights = torch.empty(masters.shape, dtype=torch.bfloat16, device=masters.device)
        cuda_kernels.dither(masters.detach().contiguous().view(-1), weights.view(-1), first)
        return weights


class LigerOps(TritonOps):
    """Norm, rotary positions and gate in one kernel each, from liger-kernel."""

    recomputes = True

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # ty: ignore[import-not-found]

        return LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # ty: ignore[import-not-found]

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, epsilon, 0.0, "llama", False)

    def rotate(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import LigerRopeFunction  # ty: ignore[import-not-found]

        heads_first = (tensor[None].transpose(1, 2) for tensor in (query, key))
        query, key = LigerRopeFunction.apply(*heads_first, cosine[None], sine[None])
        return query.transpose(1, 2)[0], key.transpose(1, 2)[0]

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # ty: ignore[import-not-found]

        return LigerSiLUMulFunction.apply(gate, up)
