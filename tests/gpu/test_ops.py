"""The kernels of a GPU at the head shapes of Qwen2.5-0.5B and 7B, against the plain computation in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.engine.torch.paged_cache import PAGE_SIZE, PagedCache
from skyrl_train.ops import REFERENCE, cuda, ops_for
from skyrl_train.ops.ragged import Ragged, ragged_attention
from skyrl_train.policy import blocks
from skyrl_train.policy.attention import PackedAttention
from tests.tiny_models import tiny_policy

HEADS = {"0.5B": (14, 2, 64), "7B": (28, 4, 128)}  # heads, kv_heads, D
PREFIX, RESTS = 300, [1, 37, 200, 129]
needs_liger = pytest.mark.skipif(
    not cuda.has_fused_blocks(), reason="liger-kernel is not installed: uv run --extra cuda"
)


def random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_of_samples_that_share_a_prefix(
    device: torch.device, heads: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_heads, kv_heads, dim = heads
    lengths = [PREFIX, *RESTS, 40, 64]  # a prefix, what continues it, two samples of their own
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    before = torch.tensor([-1, 0, 0, 0, 0, -1, -1])
    total = sum(lengths)
    inputs = [random(device, total, n, dim, seed=i) for i, n in enumerate((num_heads, kv_heads, kv_heads))]
    pull = random(device, total, num_heads, dim, seed=9)

    def computed(*tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        attention = PackedAttention(offsets, before, device)
        out = attention.attend(0, *leaves, scale=dim**-0.5, window=window)
        return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(out.dtype))]

    assert cuda.has_flash(device, torch.bfloat16, dim)
    ours = computed(*(tensor.clone() for tensor in inputs))
    exact = computed(*(tensor.float() for tensor in inputs))  # float32: the padded buckets
    for name, found, expected in zip(("out", "query", "key", "value"), ours, exact, strict=True):
        assert distance(found, expected) < 8e-3, name


def scattered(device: torch.device, rows: int, length: int, num_pages: int) -> Tensor:
    """Return pages [rows, P] int32 of sequences of this length: any, in no order, some of them shared."""
    generator = torch.Generator().manual_seed(7)
    pages = torch.randint(1, num_pages, (rows, -(-length // PAGE_SIZE)), generator=generator, dtype=torch.int32)
    pages[:, 0] = pages[0, 0]
    return pages.to(device)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_to_pages_of_which_each_sequence_uses_a_part(
    device: torch.device, heads: tuple[int, int, int], window: int | None
) -> None:
    num_heads, kv_heads, dim = heads
    keys, values = (random(device, 30, PAGE_SIZE, kv_heads, dim, seed=i) for i in (1, 2))
    used = [1, 1000, 300, 17, 513, 256]
    for counts in ([1] * 6, [1, 1, 70, 3, 1, 200]):  # decoding, and chunks of prompts among it
        query = random(device, sum(counts), num_heads, dim, seed=3)
        ragged = Ragged.of(counts, used, device, scattered(device, 6, 1000, 30))
        ours = cuda.flash_attention(query, keys, values, ragged, scale=dim**-0.5, window=window)
        exact = ragged_attention(query.float(), keys.float(), values.float(), ragged, scale=dim**-0.5, window=window)
        assert distance(ours, exact) < 8e-3, counts


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("rows", "length"), [(1, 8192), (6, 1024), (200, 256)])
@pytest.mark.parametrize("heads", [*HEADS.values(), (4, 4, 80)], ids=[*HEADS, "D = 80"])
def test_attention_of_one_new_token_per_row(
    device: torch.device, heads: tuple[int, int, int], rows: int, length: int, window: int | None
) -> None:
    num_heads, kv_heads, dim = heads
    keys, values = (random(device, 300, PAGE_SIZE, kv_heads, dim, seed=i) for i in (1, 2))
    new = [random(device, rows, kv_heads, dim, seed=i) for i in (3, 4)]
    places = torch.arange(rows, device=device) * 7 + PAGE_SIZE
    cuda.write_rows(*new, keys.flatten(0, 1), values.flatten(0, 1), places)
    assert torch.equal(keys.flatten(0, 1)[places], new[0])
    used = torch.randint(1, length + 1, (rows,), generator=torch.Generator().manual_seed(5)).to(device)
    used[-1] = 1
    pages = scattered(device, rows, length, 300)
    query = random(device, rows, num_heads, dim, seed=6)
    ours = cuda.decode_attention(query, keys, values, used, pages, scale=dim**-0.5, window=window)
    ragged = Ragged.of([1] * rows, used.tolist(), device, pages)
    exact = ragged_attention(query.float(), keys.float(), values.float(), ragged, scale=dim**-0.5, window=window)
    assert distance(ours, exact) < 8e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [1000, 151_936])
def test_statistics_of_logits_and_their_gradient(device: torch.device, vocabulary: int, temperature: float) -> None:
    logits = 4 * random(device, 50, vocabulary)
    logits[3, 7:] = -torch.inf
    targets = torch.randint(vocabulary, (50,), device=device)
    targets[3] = 2
    leaf = logits.double().requires_grad_()
    log_p = (leaf / temperature).log_softmax(-1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)
    found = ops_for(device, logits.dtype).logprobs(logits, targets, temperature)
    for ours, exact in zip(found, (logprobs, (leaf / temperature).logsumexp(-1), entropies), strict=True):
        assert_close(ours.double(), exact.detach(), rtol=1e-5, atol=1e-4)
    for pulls in ((1.0, None), (None, 1.0), (0.5, -2.0)):
        grad_logprobs, grad_entropies = (
            None if pull is None else torch.full((50,), pull, device=device) for pull in pulls
        )
        total = (pulls[0] or 0.0) * logprobs.sum() + (pulls[1] or 0.0) * entropies.sum()
        expected: Tensor = torch.autograd.grad([total], [leaf], retain_graph=True)[0].float()
        ours = logits.float()
        ops_for(device, ours.dtype).logprobs_backward(
            ours, targets, temperature, found[1], found[2], grad_logprobs, grad_entropies
        )
        finite = expected.isfinite().all(1)
        assert distance(ours[finite], expected[finite]) < 1e-4, pulls


def test_weights_are_rounded_as_by_the_reference(device: torch.device) -> None:
    masters = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    rounded = ops_for(device, torch.bfloat16).round_masters(masters.to(device))
    assert torch.equal(rounded.cpu(), REFERENCE.round_masters(masters))


@needs_liger
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fused_blocks_compute_what_the_reference_does(
    device: torch.device, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 1000, "num_attention_heads": 14, "head_dim": 64}
    policy = tiny_policy(family, device=device, initializer_range=0.02, **shape)  # float32
    ids = torch.randint(258, (200,), device=device)
    positions = torch.arange(200, device=device)

    pull = random(device, 200, 896).float()

    def computed() -> list[Tensor]:
        hidden = policy.hidden_states(ids, positions, PackedAttention(torch.tensor([0, 200]), None, device))
        return [
            hidden.detach(),
            *torch.autograd.grad((hidden * pull).sum(), list(policy.module.base_model.parameters())),
        ]

    ours = computed()
    monkeypatch.setattr(blocks, "ops_for", lambda device, dtype: REFERENCE)
    for found, expected in zip(ours, computed(), strict=True):
        assert distance(found, expected) < 1e-4


@needs_liger
def test_a_decoding_step_of_24_layers_launches_at_most_420_kernels(device: torch.device) -> None:
    from torch.profiler import ProfilerActivity, profile

    from skyrl_train.engine.torch.cuda_graphs import Bucket, DecodingStep

    shape: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "head_dim": 64}
    policy = tiny_policy("qwen2", compute_dtype=torch.bfloat16, device=device, num_hidden_layers=24, **shape)
    cache = PagedCache(policy, max_slots=32, max_length=512, max_bytes=1 << 30, evict=lambda: False)
    step = DecodingStep(policy, cache, Bucket(32, cache.longest_span))
    with torch.inference_mode():
        step.compute()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            step.compute()
            torch.cuda.synchronize()
    launched = sum(event.count for event in profiled.key_averages() if event.self_device_time_total > 0)
    assert 24 * 10 < launched <= 420
