"""The engine's life: nobody waits for ever, impossible requests fail alone, deterministic rounds are exact."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from skyrl_train.engine.base import Completion, EngineDied
from tests.skyrl_train.engine.conftest import answers, ask, until_step
from tests.tiny_models import tiny_policy

LONG: dict[str, Any] = {"min_tokens": 400, "max_tokens": 400}


async def test_close_fails_requests_in_flight(make_engine):
    engine = make_engine()
    running = [asyncio.create_task(engine.generate(ask("a", f"{i}", **LONG))) for i in range(12)]  # 4 of them wait
    await until_step(engine, 3)
    await engine.close()
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(outcome, EngineDied)
        assert "closed" in str(outcome)
    with pytest.raises(EngineDied, match="closed"):
        await engine.generate(ask("b"))
    with pytest.raises(EngineDied, match="closed"):
        await engine.weights_changed(1)
    await engine.forget("a")
    await engine.close()


async def test_a_request_made_in_the_tick_of_the_close_fails_too(make_engine):
    engine = make_engine()
    outcomes = await asyncio.gather(engine.generate(ask("a", **LONG)), engine.close(), return_exceptions=True)
    assert isinstance(outcomes[0], EngineDied)


async def test_an_error_in_a_step_reaches_everyone_who_waits(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy)
    with torch.no_grad():
        policy.module.get_output_embeddings().weight.fill_(float("nan"))
    await engine.weights_changed(1)
    outcomes = await asyncio.gather(*(engine.generate(ask("a", f"{i}")) for i in range(3)), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, EngineDied)
        assert "FloatingPointError: the policy's logits are not finite" in str(outcome)
        assert isinstance(outcome.__cause__, FloatingPointError)
    with pytest.raises(EngineDied, match="FloatingPointError"):
        await engine.generate(ask("a"))


async def test_a_cancelled_request_frees_its_slot(make_engine):
    engine = make_engine(max_num_seqs=1)
    running = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 3)
    running.cancel()
    completion = await engine.generate(ask("b", max_tokens=2, min_tokens=2))
    assert len(completion.response_ids) == 2
    assert engine.stats().tokens_sampled < 400


async def test_a_member_of_a_group_whose_leader_is_cancelled_computes_the_prompt_itself(make_engine):
    engine = make_engine(max_num_batched_tokens=10)  # the prompt takes ten steps
    leader = asyncio.create_task(engine.generate(ask("p" * 100, "leader")))
    member = asyncio.create_task(engine.generate(ask("p" * 100, "member", min_tokens=3, max_tokens=3)))
    await until_step(engine, 2)
    leader.cancel()
    assert len((await member).response_ids) == 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 512, "512 tokens, but prompt and response together may have 512"), ([999], "vocabulary")],
)
async def test_an_impossible_prompt_fails_alone(make_engine, prompt, message):
    engine = make_engine()
    bad, good = await asyncio.gather(
        engine.generate(ask(prompt, "bad")), engine.generate(ask("fine")), return_exceptions=True
    )
    assert isinstance(bad, ValueError)
    assert message in str(bad)
    assert "session bad" in str(bad)
    assert isinstance(good, Completion)


async def test_requests_wait_where_the_memory_for_their_keys_ends(make_engine):
    # 2 layers x (key, value) x 2 heads x 8 numbers x 4 bytes = 256 bytes a token: room for 3 sequences of 100 tokens
    engine = make_engine(kv_cache_bytes=256 * 300)
    requests = [ask("m" * 50, f"{i}", seed=i, min_tokens=50, max_tokens=50) for i in range(6)]
    completions = await answers(engine, requests)
    assert {len(completion.response_ids) for completion in completions} == {50}
    assert engine.stats().steps >= 100  # three at a time, fifty tokens each; all six at once would take 51 steps
    with pytest.raises(ValueError, match="cache of 350 tokens, but there is memory for 300"):
        await engine.generate(ask("m" * 50, max_tokens=300))


async def test_more_requests_than_slots_all_finish(make_engine):
    requests = [ask("r" * (i % 5 + 1), f"{i}", seed=i, max_tokens=i % 7 + 1) for i in range(60)]
    completions = await answers(make_engine(max_num_seqs=3), requests)
    assert all(1 <= len(c.response_ids) <= r.sampling.max_tokens for r, c in zip(requests, completions, strict=True))


async def test_deterministic_rounds_do_not_depend_on_the_order_of_submission(make_engine):
    policy = tiny_policy(compute_dtype=torch.bfloat16)  # rounding shows any change of batch composition
    requests = [ask("prompt " * 4 + "z" * (i // 4), f"s{i:02}", seed=i, max_tokens=20) for i in range(16)]
    outcomes = []
    for order in range(3):
        engine = make_engine(policy, deterministic=True, max_num_seqs=6)
        shuffled = random.Random(order).sample(requests, len(requests))
        await engine.generate(ask("another round before"))
        completions = await answers(engine, shuffled)
        by_session = sorted(zip((r.session_id for r in shuffled), completions, strict=True))
        outcomes.append([(session, c.response_ids, c.logprobs) for session, c in by_session])
    assert outcomes[0] == outcomes[1] == outcomes[2]


async def test_a_deterministic_round_waits_for_the_one_before_and_arrives_whole(make_engine):
    engine = make_engine(deterministic=True)
    arrived: list[str] = []

    async def turn(session_id: str, num_tokens: int) -> None:
        await engine.generate(ask("a", session_id, min_tokens=num_tokens, max_tokens=num_tokens))
        arrived.append(session_id)

    first = [asyncio.create_task(turn(name, num_tokens)) for name, num_tokens in (("long", 30), ("short", 2))]
    await until_step(engine, 1)
    await turn("next round", 1)
    assert arrived == ["short", "long", "next round"]
    assert all(task.done() for task in first)
    assert engine.stats().steps == 30 + 1  # a shared step would make it 30


async def test_a_round_is_computed_beside_nothing_else(make_engine):
    engine = make_engine()

    async def turn(num_tokens: int, session_id: str, *, in_round: bool) -> None:
        request = ask("a", session_id, min_tokens=num_tokens, max_tokens=num_tokens)
        await engine.generate(replace(request, in_round=in_round))

    free = asyncio.create_task(turn(30, "free", in_round=False))
    await until_step(engine, 1)
    together = [asyncio.create_task(turn(n, f"round {n}", in_round=True)) for n in (4, 7)]
    late = asyncio.create_task(turn(5, "late", in_round=False))  # of the same tick: it needs no round of its own
    await asyncio.gather(free, *together, late)
    assert engine.stats().steps == 30 + 7  # "late" joins "free"; the round waits for both and has its steps alone


async def test_what_else_is_in_flight_changes_the_bits_of_no_round(make_engine):
    """A long prompt is cut where the budget of a step ends, and its parts meet other kernels than the whole."""
    policy = tiny_policy(compute_dtype=torch.bfloat16)
    request = replace(ask("long " * 60, max_tokens=3, min_tokens=3, temperature=0.0), in_round=True)
    outcomes = []
    for beside in (0, 100, 300):
        engine = make_engine(policy, max_num_batched_tokens=310)
        wanted = [ask("b" * beside, "other", max_tokens=9, min_tokens=9)] * (beside > 0) + [request] * 2
        completions = await answers(engine, wanted)
        outcomes.append([completion.logprobs for completion in completions[-2:]])
    assert outcomes[0] == outcomes[1] == outcomes[2]
