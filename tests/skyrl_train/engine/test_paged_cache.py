"""The engine with keys and values in pages, on a pretended GPU: what the engine with a place for each sequence says."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from loguru import logger

from skyrl_train.engine.base import Completion, Request
from skyrl_train.engine.torch import forward, paged_cache, scheduler
from skyrl_train.engine.torch.cuda_graphs import GraphedPolicy
from skyrl_train.engine.torch.forward import computes_in_pages
from skyrl_train.engine.torch.kv_cache import KVCache
from skyrl_train.engine.torch.paged_cache import PagedCache
from skyrl_train.engine.torch.scheduler import Scheduler, Sequence
from skyrl_train.policy.model import Policy
from tests.pretend_cuda import PretendCuda
from tests.skyrl_train.engine.conftest import ask
from tests.skyrl_train.engine.test_ahead import assert_same, played
from tests.skyrl_train.engine.test_pages import assert_sound
from tests.skyrl_train.engine.test_torch_engine import assert_learner_agrees, learner_logprobs
from tests.tiny_models import tiny_policy, tiny_tokenizer

PAGE, CONTEXT = 16, 160
SYSTEM = [(7 * i) % 250 for i in range(40)]
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, D, float32


pytestmark = pytest.mark.usefixtures("pretend_cuda")


@pytest.fixture
def policy(policy_on_cuda: Policy) -> Policy:
    return policy_on_cuda


@pytest.fixture(scope="module")
def exact() -> Policy:
    """A policy in float64: rounding cannot make two of its engines draw different tokens."""
    with torch.no_grad(), PretendCuda():
        return tiny_policy(compute_dtype=torch.float64, device="cuda")


def scheduler_of(
    policy: Policy, *, in_pages: bool, num_tokens: int = 10_000, max_num_seqs: int = 5, session_tokens: int = 10_000
) -> Scheduler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "computes_in_pages", lambda *_, **__: in_pages)
        patch.setattr(scheduler, "PagedCache", partial(PagedCache, page_size=PAGE))
        return Scheduler(
            policy,
            tiny_tokenizer(),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=48,
            max_model_len=CONTEXT,
            kv_cache_bytes=num_tokens * BYTES_PER_TOKEN,
            session_cache_bytes=session_tokens * BYTES_PER_TOKEN,
            cuda_graphs=True,
        )


def pages_of(scheduler: Scheduler) -> PagedCache:
    assert isinstance(scheduler._cache, PagedCache)
    return scheduler._cache


def assert_pages_sound(scheduler: Scheduler) -> None:
    kept: list[Any] = [kept.saved for kept in scheduler._sessions._kept.values()]
    assert_sound(pages_of(scheduler)._pages, [saved.pages for saved in kept])


def request_of(dice: random.Random, session: str, history: list[int]) -> Request:
    """Return the next turn of a session, or a first one, which others begin with as well."""
    fresh = [*SYSTEM[: dice.choice([16, 23, 32, 40])], *(dice.randrange(250) for _ in range(dice.randint(0, 9)))]
    news = [dice.randrange(250) for _ in range(dice.randint(1, 5))]
    prompt = [*history, *news] if history and len(history) < 100 else fresh
    cut: dict[str, Any] = dice.choice([{}, {}, {"temperature": 0}, {"top_k": 30}, {"repetition_penalty": 1.2}])
    limits = {"max_tokens": dice.randint(8, 20), "min_tokens": dice.choice([0, 0, 8])}
    return ask(prompt, session, seed=dice.randrange(1000), **cut, **limits)


def life(scheduler: Scheduler, policy: Policy, seed: int) -> list[Completion | None]:
    """Play sessions of several turns; some requests are aborted, some sessions forgotten, and weights change."""
    dice, version = random.Random(seed), 0
    before = {name: weight.clone() for name, weight in policy.module.named_parameters()}
    sequences: list[Sequence] = []
    done: dict[Sequence, Completion] = {}
    histories: dict[str, list[int]] = {}
    for step in range(60):
        for _ in range(dice.choice([0, 0, 0, 1, 3])):
            session = f"s{dice.randrange(6)}"
            sequences.append(scheduler.add(request_of(dice, session, histories.get(session, []))))
        in_flight = [sequence for sequence in sequences if not sequence.has_ended]
        if step % 12 == 7 and in_flight:
            scheduler.abort(dice.choice(in_flight))
        elif step in (20, 45):
            version += 1
            for weight in policy.module.parameters():
                weight.mul_(1.02)
            scheduler.weights_changed(version)
        elif step % 12 == 3:
            scheduler.forget(f"s{dice.randrange(6)}")
        if not scheduler.is_idle:
            for sequence, completion in scheduler.step():
                done[sequence] = completion
                histories[sequence.request.session_id] = list(sequence.tokens)
        if isinstance(scheduler._cache, PagedCache):
            assert_pages_sound(scheduler)
    while not scheduler.is_idle:
        done |= dict(scheduler.step())
    for name, weight in policy.module.named_parameters():
        weight.copy_(before[name])
    return [done.get(sequence) for sequence in sequences]


@pytest.mark.parametrize("seed", range(3))
def test_random_sessions_aborts_and_new_weights_give_the_same_completions(exact: Policy, seed: int) -> None:
    in_pages, in_slots = (scheduler_of(exact, in_pages=is_on) for is_on in (True, False))
    assert isinstance(in_slots._cache, KVCache)
    ours, theirs = (life(each, exact, seed) for each in (in_pages, in_slots))
    assert_same(ours, theirs)
    assert sum(completion is not None for completion in ours) > 20
    assert any(completion is None for completion in ours)
    for mine, other in zip(ours, theirs, strict=True):
        if mine and other:
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert in_pages.stats.tokens_reused == in_slots.stats.tokens_reused > 200
    assert isinstance(in_pages._model, GraphedPolicy)
    assert in_pages._model.num_recorded <= 4  # 1, 2, 4 and 5 rows
    in_pages._sessions.clear()
    assert pages_of(in_pages).num_free_pages == pages_of(in_pages)._pages.num_pages


@pytest.mark.parametrize("seed", range(3))
def test_with_hardly_any_pages_requests_wait_and_old_sessions_go(exact: Policy, seed: int) -> None:
    dice = random.Random(seed)
    requests = [request_of(dice, f"s{i}", []) for i in range(12)]
    tight = scheduler_of(exact, in_pages=True, num_tokens=200, session_tokens=120)  # ten pages: numbers have 8 bytes
    ample = scheduler_of(exact, in_pages=False)
    assert pages_of(tight)._pages.num_pages == 10
    ours, theirs = played(tight, requests), played(ample, requests)
    assert_same(ours, theirs)
    assert tight.stats.steps > ample.stats.steps
    assert 0 < len(tight._sessions._kept) < 12
    assert_pages_sound(tight)


def test_logprobs_in_float32_are_the_learners(policy: Policy) -> None:
    dice = random.Random(0)
    requests = [request_of(dice, f"s{i}", []) for i in range(12)]
    for request, completion in zip(requests, played(scheduler_of(policy, in_pages=True), requests), strict=True):
        assert completion is not None
        temperature = request.sampling.temperature or 1.0
        expected = learner_logprobs(policy, request.prompt_ids, completion.response_ids, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_shared_system_prompt_lies_in_memory_once_and_is_never_copied(policy: Policy) -> None:
    system = SYSTEM[:32]  # two whole pages
    scheduler = scheduler_of(policy, in_pages=True, max_num_seqs=30)
    for i in range(30):
        scheduler.add(ask([*system, 200 + i, 5], f"s{i}", seed=i, min_tokens=10, max_tokens=10))
    copies = counted_copies(scheduler)
    for _ in range(5):
        scheduler.step()
    cache = pages_of(scheduler)
    assert len(scheduler._slots) == 30
    assert cache._pages.num_pages - cache.num_free_pages == 2 + 30
    assert sum(copies) == 0


def test_the_next_turn_takes_up_the_pages_of_the_last_one_and_copies_at_most_one(policy: Policy) -> None:
    scheduler = scheduler_of(policy, in_pages=True)
    copies = counted_copies(scheduler)
    history, computed = SYSTEM, 0
    for turn in range(4):
        request = ask([*history, 1 + turn, 2], seed=turn, min_tokens=15, max_tokens=15)
        [completion] = played(scheduler, [request])
        assert completion is not None
        assert_learner_agrees(policy, request, completion)
        history = [*request.prompt_ids, *completion.response_ids]
        new = scheduler.stats.prompt_tokens_computed - computed
        assert new == (42 if turn == 0 else 3)  # the last reply's last token was drawn, but never computed
        computed = scheduler.stats.prompt_tokens_computed
        assert sum(copies) <= turn


def counted_copies(scheduler: Scheduler) -> list[int]:
    counts: list[int] = []
    cache = pages_of(scheduler)
    make = cache._pages.make_writable

    def counted(*given: int) -> list[Any]:
        copies = make(*given)
        counts.append(len(copies))
        return copies

    cache._pages.make_writable = counted  # ty: ignore[invalid-assignment]
    return counts


def test_more_copies_than_are_made_at_once_reach_their_pages(policy: Policy) -> None:
    cache = PagedCache(policy, max_slots=60, max_length=64, max_bytes=2**24, evict=lambda: False, page_size=PAGE)
    for layer in range(2):
        for store in cache.layer(layer):
            store.copy_(torch.randn(store.shape).to("cuda"))
    first = cache.layer(1)[1][1].cpu()
    cache._pages.make_writable(0, 0, 5)
    for slot in range(1, 50):
        cache.share(0, slot, 5)
    assert 2 * paged_cache.PAGES_AT_ONCE < 49
    cache.attention([forward.Chunk(slot, 5, 1) for slot in range(50)])
    own = cache.places(torch.arange(50))[:, 0].tolist()
    assert len(set(own)) == 50
    for page in own:
        assert torch.equal(cache.layer(1)[1][page].cpu(), first)


def test_pages_are_used_where_a_flash_kernel_reads_them_rightly(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    assert not computes_in_pages(policy)  # float32
    monkeypatch.setattr(forward, "has_flash", lambda *_: True)
    monkeypatch.setattr(forward, "PagedCache", partial(PagedCache, page_size=PAGE))
    assert computes_in_pages(policy)
    assert computes_in_pages(policy, max_length=20)
    assert not warnings
    right = paged_cache.paged_attention
    monkeypatch.setattr(paged_cache, "paged_attention", lambda *given, **options: right(*given, **options) * 1.1)
    assert not computes_in_pages(policy)

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("Paged KV cache block size must be divisible by 512\nmore")

    monkeypatch.setattr(paged_cache, "paged_attention", refuses)
    assert not computes_in_pages(policy)
    logger.remove(sink)
    assert "away (relative)" in warnings[0]
    assert "must be divisible by 512" in warnings[1]
