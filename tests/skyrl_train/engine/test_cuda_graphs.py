"""A decoding step over buffers that stay where they are, computed on the processor: only recording it needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.engine.torch import scheduler
from skyrl_train.engine.torch.cuda_graphs import Bucket, Compute, DecodingStep, GraphedPolicy, NothingFromTheHost
from skyrl_train.engine.torch.kv_cache import Chunk, KVCache
from skyrl_train.engine.torch.paged_cache import Cache, PagedCache
from skyrl_train.policy.model import Policy
from tests.skyrl_train.engine.conftest import answers, ask
from tests.skyrl_train.engine.test_torch_engine import PROMPT, assert_learner_agrees
from tests.tiny_models import tiny_policy

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 5}),
    ("gpt2", {"num_key_value_heads": None}),
]
LENGTHS = [3, 40, 1, 11, 7]  # tokens in the cache, by slot


def again(compute: Compute) -> Compute:
    """Records nothing: every replay computes anew."""
    return compute


def filled_cache(policy: Policy, *, length: int = 64) -> KVCache:
    """The first tokens of five sequences, and junk wherever nobody may look."""
    cache = KVCache(policy, max_slots=8, max_length=512, max_bytes=2**30)
    cache.reserve(6, length)
    for layer in range(policy.config.num_hidden_layers):
        for store in cache.layer(layer):
            store.copy_(torch.randn(store.shape, generator=torch.Generator().manual_seed(layer)))
    return filled(policy, cache)


def filled_pages(policy: Policy, *, page_size: int = 16) -> PagedCache:
    """The same sequences in pages."""
    options: dict[str, Any] = {"max_bytes": 2**24, "evict": lambda: False, "page_size": page_size}
    return filled(policy, PagedCache(policy, max_slots=8, max_length=512, **options))


def filled(policy: Policy, cache: Any) -> Any:
    for slot, length in enumerate(LENGTHS):
        positions = torch.arange(length)
        plainly(policy).hidden_states(positions + slot, positions, cache.attention([Chunk(slot, 0, length)]))
    return cache


def plainly(policy: Policy) -> GraphedPolicy:
    return GraphedPolicy(policy, None)


def one_token(model: GraphedPolicy, cache: Cache, slots: list[int], token: int = 9) -> Tensor:
    """Hidden states of one more token in each of these slots."""
    chunks = [Chunk(slot, LENGTHS[slot], 1) for slot in slots]
    positions = torch.tensor([chunk.start for chunk in chunks])
    return model.hidden_states(torch.arange(len(slots)) + token, positions, cache.attention(chunks))


@pytest.mark.parametrize("slots", [[0], [0, 1, 2, 3, 4], [1, 3], [4]], ids=str)
@pytest.mark.parametrize(("family", "config"), FAMILIES)
@torch.inference_mode()
def test_a_static_step_computes_what_the_plain_one_does(family: str, config: dict, slots: list[int]) -> None:
    policy = tiny_policy(family, **config)
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, again)
    for token in (9, 20):  # the second one is replayed, and finds the first one's keys where its own belong
        ours = one_token(graphed, cache, slots, token)
        assert_close(ours, one_token(plainly(policy), cache, slots, token), atol=2e-5, rtol=1e-4)
    assert graphed.num_recorded == 1


@torch.inference_mode()
def test_slots_that_idle_along_lose_nothing_that_they_have_computed() -> None:
    policy = tiny_policy("mistral", sliding_window=5)
    cache, untouched = (filled_cache(policy, length=500) for _ in range(2))  # longer than what is attended to
    graphed = GraphedPolicy(policy, again)
    for _ in range(2):
        one_token(graphed, cache, [1, 3])
    for slot, length in enumerate(LENGTHS):
        assert_close(cache.save(slot, length).tensor, untouched.save(slot, length).tensor, atol=0, rtol=0)
    assert all(store.isfinite().all() for layer in range(2) for store in cache.layer(layer))


@torch.inference_mode()
def test_a_cache_that_grew_is_recorded_anew() -> None:
    policy = tiny_policy()
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, again)
    one_token(graphed, cache, [0, 1])
    cache.reserve(8, 512)
    assert_close(one_token(graphed, cache, [0, 1]), one_token(plainly(policy), cache, [0, 1]), atol=2e-5, rtol=1e-4)
    assert graphed.num_recorded == 1
    assert_close(one_token(graphed, cache, [0, 1]), one_token(plainly(policy), cache, [0, 1]), atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_weights_changed_in_place_are_seen_and_weights_that_moved_are_recorded_anew() -> None:
    policy = tiny_policy()
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, again)
    before = one_token(graphed, cache, [0, 1])
    weight: Any = policy.module.get_parameter("model.norm.weight")
    weight.mul_(2)
    graphed.weights_changed()
    assert graphed.num_recorded == 1
    assert_close(one_token(graphed, cache, [0, 1]), 2 * before)
    weight.data = weight.data.clone()
    graphed.weights_changed()
    assert graphed.num_recorded == 0


def refuse(compute: Compute) -> Compute:
    raise RuntimeError("operation not permitted when stream is capturing")


def lie(compute: Compute) -> Compute:
    return lambda: compute() * 1.2


def say_nothing_finite(compute: Compute) -> Compute:
    return lambda: compute() * torch.nan


@pytest.mark.parametrize("record", [refuse, lie, say_nothing_finite])
@torch.inference_mode()
def test_a_recording_that_fails_or_differs_is_given_up_for_good(record: Callable[[Compute], Compute]) -> None:
    policy = tiny_policy()
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, record)
    for slots in ([0, 1], [0, 1], [0, 1, 2, 3]):
        assert_close(one_token(graphed, cache, slots), one_token(plainly(policy), cache, slots), atol=0, rtol=0)
    assert graphed.num_recorded == 0


@torch.inference_mode()
def test_a_recording_that_failed_is_tried_once_more_and_other_numbers_of_rows_are_recorded() -> None:
    tried: list[int] = []

    def fails(compute: Compute) -> Compute:
        rows = len(compute())
        tried.append(rows)
        if rows == 4 or tried.count(2) == 1:
            raise RuntimeError("CUDA out of memory")
        return compute

    policy = tiny_policy()
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, fails)
    for slots in ([0, 1], [0, 1], [0, 1], *[[0, 1, 2, 3]] * 4, [0]):
        ours = one_token(graphed, cache, slots)
        assert_close(ours, one_token(plainly(policy), cache, slots), atol=2e-5, rtol=1e-4)
    assert tried == [2, 2, 4, 4, 1]
    assert graphed.num_recorded == 2


@pytest.mark.parametrize("make", [filled_cache, filled_pages], ids=["slots", "pages"])
@pytest.mark.parametrize(("family", "config"), FAMILIES)
@torch.inference_mode()
def test_prompts_beside_decoding_rows_leave_those_their_graph(
    family: str, config: dict, make: Callable[[Policy], Cache]
) -> None:
    policy = tiny_policy(family, **config)
    chunks = [Chunk(0, 3, 1), Chunk(3, 11, 1), Chunk(4, 7, 5), Chunk(1, 40, 9), Chunk(5, 0, 20)]
    positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])

    def computed(model: GraphedPolicy, cache: Cache) -> Tensor:
        return model.hidden_states(positions + 7, positions, cache.attention(chunks))

    expected = computed(plainly(policy), filled_cache(policy))
    graphed = GraphedPolicy(policy, again)
    cache = make(policy)
    for _ in range(2):
        assert_close(computed(graphed, cache), expected, atol=2e-5, rtol=1e-4)
    assert graphed.num_recorded == 1
    assert_close(computed(plainly(policy), make(policy)), expected, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_in_pages_a_number_of_rows_has_one_graph_whatever_their_slots_and_lengths() -> None:
    policy = tiny_policy()
    cache, graphed = filled_pages(policy), GraphedPolicy(policy, again)
    for slots in ([0, 1], [2, 3], [0, 2], [1, 4], [0, 2, 4]):
        ours = one_token(graphed, cache, slots).clone()
        assert_close(ours, one_token(plainly(policy), filled_cache(policy), slots), atol=2e-5, rtol=1e-4)
    assert graphed.num_recorded == 2  # of 2 and 4 rows: the fourth has no sequence, and writes into nobody's page


def test_rows_and_spans_are_rounded_up_to_few_numbers_within_the_cache() -> None:
    cache = KVCache(tiny_policy(), max_slots=300, max_length=5000, max_bytes=2**34)
    cache.reserve(290, 5000)
    rows = [Bucket.around(number, 1, cache).rows for number in range(1, 291)]
    assert sorted(set(rows)) == [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), 290]
    assert all(least <= number for least, number in enumerate(rows, start=1))
    spans = [Bucket.around(1, span, cache).span for span in range(1, 5001)]
    assert sorted(set(spans)) == [*range(256, 2049, 256), 2560, 3072, 3584, 4096, cache.length]
    assert all(least <= span for least, span in enumerate(spans, start=1))


@torch.inference_mode()
def step_on_meta(policy: Policy) -> DecodingStep:
    """Where tensors have no numbers: nothing can depend on one."""
    policy = Policy(policy.module.to("meta"))
    cache = KVCache(policy, max_slots=8, max_length=512, max_bytes=2**30)
    cache.reserve(8, 512)
    return DecodingStep(policy, cache, Bucket(8, 256))


@pytest.mark.parametrize(("family", "config"), FAMILIES[:-1])  # GPT-2 looks for padding
@torch.inference_mode()
def test_a_step_needs_nothing_from_the_host_so_that_it_can_be_recorded(family: str, config: dict) -> None:
    step = step_on_meta(tiny_policy(family, **config))
    with NothingFromTheHost():
        assert step.compute().shape == (8, 32)


@pytest.mark.parametrize(
    ("asks", "operation"),
    [
        (lambda x: bool(x.sum() > 0), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x[torch.ones(2, device=x.device, dtype=torch.bool)], "index"),
        (lambda x: torch.tensor([1.0]).to(x.device), "_to_copy"),
        (lambda x: torch.tensor(1.0).to(x.device), "_to_copy"),
        (lambda x: x[torch.tensor([1, 0])], "index"),
    ],
)
def test_what_asks_the_host_is_found_before_it_is_recorded(asks: Callable[[Tensor], Any], operation: str) -> None:
    x = torch.zeros(2, 3, device="meta")
    with NothingFromTheHost():
        x[torch.zeros(2, device="meta", dtype=torch.long)].add(1).index_copy_(0, x[0].long()[:2], x)
        x.add_(torch.tensor(1.0)).masked_fill_(x > 0, 1.0)
    with pytest.raises(RuntimeError, match=f"asks the host in .*{operation}"), NothingFromTheHost():
        asks(x)


async def test_an_engine_samples_the_same_through_static_steps(make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("mistral", sliding_window=24)
    graphed: list[GraphedPolicy] = []

    def forward_pass(policy: Policy, *, cuda_graphs: bool, max_length: int) -> tuple[GraphedPolicy, None]:
        graphed.append(GraphedPolicy(policy, again if cuda_graphs else None))
        return graphed[-1], None

    monkeypatch.setattr(scheduler, "forward_pass", forward_pass)
    requests = [ask(PROMPT[i:], f"s{i}", seed=i, min_tokens=7 * i, max_tokens=7 * i + 20) for i in range(9)]
    completions = await answers(make_engine(policy, max_num_seqs=5), requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_learner_agrees(policy, request, completion)
    assert graphed[0].num_recorded >= 4  # rows 5, 4, 2, 1, as sequences end
    await make_engine(policy, deterministic=True).generate(requests[1])
    assert graphed[1].num_recorded == 0
