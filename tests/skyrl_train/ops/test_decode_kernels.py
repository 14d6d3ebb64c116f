"""The compiled kernels, against torch's own operations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.ops.base import RowTokens
from skyrl_train.ops.cpu.decode_kernels import DecodeKernels, NoKernels, Norm, Shape

HEADS, KV_HEADS, DIM, SLOTS, LENGTH = 6, 2, 16, 3, 300


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels(dtype) -> DecodeKernels:
    try:
        return DecodeKernels(Shape(HEADS, KV_HEADS, DIM, dtype))
    except NoKernels as reason:
        pytest.skip(str(reason))


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_rounded(ours: Tensor, exact: Tensor) -> None:
    """The exact value but for one rounding (and float32's own, within the kernel)."""
    tolerance = 2e-6 if ours.dtype == torch.float32 else 2**-8
    assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


def exact(norm: Norm, row: Tensor) -> Tensor:
    return F.rms_norm(row.double(), norm.weight.shape, norm.weight.double(), norm.epsilon)


@pytest.mark.parametrize("width", [8, 100, 576])
@torch.inference_mode()
def test_rms_norm(kernels, dtype, width):
    row, norm = numbers(5, width, dtype=dtype, scale=3), Norm(numbers(width, dtype=dtype, seed=1), 1e-5)
    assert_rounded(kernels.rms_norm(row, norm), exact(norm, row))


@torch.inference_mode()
def test_swiglu_from_tiny_to_huge_gates(kernels, dtype):
    gate_up = torch.cat([numbers(7, 33, dtype=dtype, scale=40), numbers(7, 33, dtype=dtype, seed=1)], dim=1)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_rounded(kernels.swiglu(gate_up), F.silu(gate) * up)


@torch.inference_mode()
def test_not_a_number_stays_not_a_number(kernels, dtype):
    gate_up = torch.full((2, 64), torch.nan, dtype=dtype)
    assert kernels.swiglu(gate_up).isnan().all()
    assert kernels.rms_norm(gate_up, Norm(torch.ones(64, dtype=dtype), 1e-5)).isnan().all()


@pytest.mark.parametrize("normed", [False, True])
@torch.inference_mode()
def test_queries_and_keys_are_rotated_and_keys_and_values_stored_in_their_slots(kernels, dtype, normed):
    heads = numbers(4, HEADS + 2 * KV_HEADS, DIM, dtype=dtype)
    cosine, sine = numbers(4, DIM, dtype=dtype, seed=1), numbers(4, DIM, dtype=dtype, seed=2)
    norms = tuple(Norm(numbers(DIM, dtype=dtype, seed=seed), 1e-5) for seed in (3, 4)) if normed else None
    query, key, value = heads.clone().split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if norms:
        query, key = (exact(norm, part).to(dtype) for norm, part in zip(norms, (query, key), strict=True))
    expected = []
    for part in (query.double(), key.double()):
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        expected.append(part * cosine[:, None].double() + turned * sine[:, None].double())
    keys, values = (torch.zeros(SLOTS, KV_HEADS, LENGTH, DIM, dtype=dtype) for _ in range(2))
    slots, positions = torch.tensor([0, 1, 2, 2]), torch.tensor([5, 0, 298, 299])
    places = slots * keys.stride(0) + positions * keys.stride(2)
    kernels.rotate_and_store(heads, cosine, sine, norms, keys, values, places)
    assert_rounded(heads[:, :HEADS], expected[0])
    assert_rounded(keys[slots, :, positions], expected[1])
    assert torch.equal(values[slots, :, positions], value)
    assert int((values != 0).any(-1).sum()) == 4 * KV_HEADS  # nothing else was written


@pytest.mark.parametrize("shared", [(0, 0, 0), (1, 64, 130), (0, 7, 300)])
@pytest.mark.parametrize("window", [None, 1, 70])
@torch.inference_mode()
def test_attention_sees_the_tokens_up_to_its_own_within_the_window(kernels, dtype, window, shared):
    heads = numbers(3, HEADS + 2 * KV_HEADS, DIM, dtype=dtype, scale=3)
    keys, values = (numbers(SLOTS, KV_HEADS, LENGTH, DIM, dtype=dtype, seed=seed) for seed in (1, 2))
    slots, positions = torch.tensor([2, 0, 1]), torch.tensor([0, 63, 299])  # less, as much and more than one block
    prefix_slots = torch.tensor([0, 1, 2])  # they hold other tokens here, to see what is read from where
    tokens = RowTokens(slots, positions, prefix_slots, torch.tensor(shared))
    out = kernels.attend(heads, keys, values, tokens, scale=0.3, window=window)
    for row, (slot, position, prefix_slot, length) in enumerate(
        zip(slots, positions, prefix_slots, shared, strict=True)
    ):
        seen = slice(0 if window is None else max(0, int(position) + 1 - window), int(position) + 1)
        key, value = (
            torch.cat((of[prefix_slot, :, :length], of[slot, :, length:]), 1)[:, seen] for of in (keys, values)
        )
        query = heads[row, :HEADS].double().view(KV_HEADS, -1, DIM)
        weights = (0.3 * query @ key.double().mT).softmax(-1)
        assert_rounded(out[row], (weights @ value.double()).flatten(0, 1))


def test_odd_shapes_are_refused():
    with pytest.raises(NoKernels, match="not written for"):
        DecodeKernels(Shape(6, 4, 16, torch.float32))
    with pytest.raises(NoKernels, match="not written for"):
        DecodeKernels(Shape(6, 2, 16, torch.float16))
