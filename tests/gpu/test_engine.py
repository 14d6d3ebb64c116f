"""The engine on a GPU: the learner's logprobs, through graphs and without, for one request and for hundreds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.engine.torch import TorchEngine
from skyrl_train.engine.torch.cuda_graphs import CudaGraphs, GraphedPolicy
from skyrl_train.engine.torch.paged_cache import PagedCache
from skyrl_train.engine.torch.sampling import sample
from skyrl_train.policy.model import Policy
from tests.skyrl_train.engine.conftest import answers, ask, until_step
from tests.skyrl_train.engine.test_ahead import drawn_requests, pair, played
from tests.skyrl_train.engine.test_batched_sampling import CUTS
from tests.skyrl_train.engine.test_cuda_graphs import FAMILIES, LENGTHS, filled_cache, one_token, plainly
from tests.skyrl_train.engine.test_sampling import row
from tests.skyrl_train.engine.test_torch_engine import PROMPT, assert_learner_agrees, learner_logprobs
from tests.tiny_models import tiny_policy


def num_recorded(engine: TorchEngine) -> int:
    model = engine._scheduler._model
    assert isinstance(model, GraphedPolicy)
    return model.num_recorded


@pytest.mark.parametrize("slots", [[0], [0, 1, 2, 3, 4], [1, 3]], ids=str)
@pytest.mark.parametrize(("family", "config"), FAMILIES[:-1])
@torch.inference_mode()
def test_a_replayed_step_computes_what_the_plain_one_does(
    device: torch.device, family: str, config: dict[str, Any], slots: list[int]
) -> None:
    policy = tiny_policy(family, device=device, **config)
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, CudaGraphs(device))
    for token in (9, 20, 30):  # replayed from the second on, which finds the one before where its own keys belong
        ours = one_token(graphed, cache, slots, token).clone()
        assert_close(ours, one_token(plainly(policy), cache, slots, token), atol=1e-4, rtol=1e-3)
    assert graphed.num_recorded == 1


@torch.inference_mode()
def test_graphs_of_several_sizes_share_their_memory_without_disturbing_each_other(device: torch.device) -> None:
    policy = tiny_policy(device=device)
    cache = filled_cache(policy)
    graphed = GraphedPolicy(policy, CudaGraphs(device))
    for slots in ([0, 1, 2, 3, 4], [0], [0, 1], [0, 1, 2, 3, 4], [0], [0, 1]):
        ours = one_token(graphed, cache, slots).clone()
        assert_close(ours, one_token(plainly(policy), cache, slots), atol=1e-4, rtol=1e-3)
    assert graphed.num_recorded == 3
    cache.reserve(8, max(LENGTHS) + 400)
    ours = one_token(graphed, cache, [0, 1]).clone()
    assert_close(ours, one_token(plainly(policy), cache, [0, 1]), atol=1e-4, rtol=1e-3)
    assert graphed.num_recorded == 1


@pytest.mark.parametrize("deterministic", [False, True], ids=["graphs", "deterministic"])
@pytest.mark.parametrize(("family", "config"), FAMILIES[:-1])
async def test_logprobs_are_the_learners(
    make_engine, device: torch.device, family: str, config: dict[str, Any], deterministic: bool
) -> None:
    policy = tiny_policy(family, device=device, **config)
    engine = make_engine(policy, max_num_seqs=4, deterministic=deterministic)
    requests = [ask(PROMPT + "x" * i, f"s{i}", seed=i, temperature=0.5 + 0.25 * i, max_tokens=40) for i in range(7)]
    for request, completion in zip(requests, await answers(engine, requests), strict=True):
        assert_learner_agrees(policy, request, completion)
    assert (num_recorded(engine) > 0) != deterministic


async def test_a_family_that_asks_the_host_in_mid_pass_does_without_graphs(make_engine, device: torch.device) -> None:
    family, config = FAMILIES[-1]
    policy = tiny_policy(family, device=device, **config)
    engine = make_engine(policy)
    request = ask(PROMPT, max_tokens=30)
    assert_learner_agrees(policy, request, await engine.generate(request))
    assert num_recorded(engine) == 0


async def test_in_bfloat16_logprobs_stay_close_to_the_learners(make_engine, device: torch.device) -> None:
    policy = tiny_policy("qwen2", compute_dtype=torch.bfloat16, device=device)
    engine = make_engine(policy)
    requests = [ask(PROMPT, f"{i}", seed=i, max_tokens=40) for i in range(8)]
    for request, completion in zip(requests, await answers(engine, requests), strict=True):
        expected = learner_logprobs(policy, request.prompt_ids, completion.response_ids, 1.0)
        assert torch.tensor(completion.logprobs).sub(torch.tensor(expected)).abs().mean() < 0.05
    assert num_recorded(engine) > 0
    assert isinstance(engine._scheduler._cache, PagedCache)


async def test_turns_behind_a_shared_system_prompt_read_the_pages_of_others(make_engine, device: torch.device) -> None:
    policy = tiny_policy("qwen2", compute_dtype=torch.bfloat16, device=device, max_position_embeddings=2048)
    engine = make_engine(policy, max_num_seqs=20)
    histories = [[*(token % 250 for token in range(600)), i] for i in range(20)]
    for turn in range(3):
        asked = [ask([*h, 7, turn], f"{i}", seed=i, max_tokens=100) for i, h in enumerate(histories)]
        for i, (request, completion) in enumerate(zip(asked, await answers(engine, asked), strict=True)):
            expected = learner_logprobs(policy, request.prompt_ids, completion.response_ids, 1.0)
            assert torch.tensor(completion.logprobs).sub(torch.tensor(expected)).abs().mean() < 0.05
            histories[i] = [*request.prompt_ids, *completion.response_ids]
    assert engine.stats().prompt_tokens_computed < 603 + 20 * 3 * 5


async def test_256_requests_of_many_lengths_are_batched_as_slots_come_free(make_engine, device: torch.device) -> None:
    policy = tiny_policy(device=device)
    engine = make_engine(policy, max_num_seqs=100, max_num_batched_tokens=512)
    requests = [ask(PROMPT[i % 40 :] + str(i), f"{i}", seed=i, max_tokens=1 + (7 * i) % 90) for i in range(256)]
    completions = await answers(engine, requests)
    for request, completion in zip(requests[::5], completions[::5], strict=True):
        assert_learner_agrees(policy, request, completion)
    assert engine.stats().tokens_sampled == sum(len(completion.response_ids) for completion in completions)
    assert engine.stats().steps < 400  # one by one they would take 11,000


async def test_same_seed_gives_the_same_tokens_alone_and_in_a_crowd(make_engine, device: torch.device) -> None:
    engine = make_engine(tiny_policy(device=device))
    alone = await engine.generate(ask("hello", seed=7, max_tokens=30))
    crowd = [ask("hello", seed=7, max_tokens=30), *(ask("y" * i, f"{i}", seed=i, max_tokens=i) for i in range(1, 20))]
    first, *_ = await answers(engine, crowd)
    assert first.response_ids == alone.response_ids
    assert (await engine.generate(ask("hello", seed=8, max_tokens=30))).response_ids != alone.response_ids


def test_steps_started_ahead_draw_what_steps_one_by_one_draw(device: torch.device) -> None:
    policy = tiny_policy(device=device)
    for seed in range(20):
        ahead, one_by_one = pair(policy)
        requests = drawn_requests(seed, count=12)
        ours, theirs = played(ahead, requests), played(one_by_one, requests)
        assert [c and c.response_ids for c in ours] == [c and c.response_ids for c in theirs]
        for request, completion in zip(requests, ours, strict=True):
            assert completion is not None
            assert_learner_agrees(policy, request, completion)


async def test_new_weights_are_seen_by_the_next_step_and_the_graphs_stay(make_engine, device: torch.device) -> None:
    policy = tiny_policy(device=device)
    engine = make_engine(policy)
    request = ask(PROMPT, min_tokens=300, max_tokens=300)
    running = asyncio.create_task(engine.generate(request))
    await until_step(engine, 20)
    recorded = num_recorded(engine)
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.mul_(1.2)
    await engine.weights_changed(1)
    assert num_recorded(engine) == recorded > 0
    await running  # begun with the old weights
    again = ask(PROMPT, "after", seed=1)
    completion = await engine.generate(again)
    assert completion.policy_version == 1
    assert_learner_agrees(policy, again, completion)


def test_a_gpu_draws_the_tokens_that_the_processor_draws(device: torch.device) -> None:
    logits = 3 * torch.randn(20 * len(CUTS), 1000, generator=torch.Generator().manual_seed(4))
    rows = [row(seed, tokens=(1, 2, 3), **CUTS[seed % len(CUTS)]) for seed in range(len(logits))]
    tokens, logprobs = sample(logits.to(device), rows)
    expected = sample(logits, rows)
    assert sum(ours == theirs for ours, theirs in zip(tokens, expected[0], strict=True)) >= 0.99 * len(rows)
    same = [i for i, token in enumerate(tokens) if token == expected[0][i]]
    assert [logprobs[i] for i in same] == pytest.approx([expected[1][i] for i in same], abs=1e-4)


def test_logits_that_are_not_finite_are_an_error_and_the_gpu_works_on(device: torch.device) -> None:
    bad = torch.zeros(2, 1000, device=device)
    bad[1, 3] = torch.nan
    options: list[dict[str, Any]] = [{}, {"top_p": 0.5}, {"temperature": 0}]
    for params in options:
        with pytest.raises(FloatingPointError, match="diverged"):
            sample(bad, [row(0, **params), row(1, **params)])
    assert sample(torch.zeros(1, 1000, device=device), [row()])[1] == pytest.approx([-6.9078], abs=1e-3)


def test_the_policy_is_on_the_gpu(device: torch.device) -> None:
    policy: Policy = tiny_policy(device=device)
    assert {weight.device for weight in policy.weights.values()} == {device}
