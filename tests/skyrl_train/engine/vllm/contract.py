"""What every engine keeps to, asked of the torch engine and of vLLM. `test_vllm.py` runs this in a process apart."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from skyrl_train.engine.base import Completion, Request
from tests.skyrl_train.engine.conftest import answers, ask
from tests.skyrl_train.engine.test_torch_engine import PROMPT, assert_learner_agrees
from tests.skyrl_train.engine.vllm.conftest import ENDS, learner_of, policy_of, weights_of
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="session")
LONG: dict[str, Any] = {"min_tokens": 200, "max_tokens": 200}
CUTS: dict[str, Any] = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, CUTS, {"min_tokens": 30}])
async def test_logprobs_are_the_learners_before_cuts_and_penalties(engine, policy, settings):
    requests = [ask(PROMPT + "x" * i, f"s{i}", seed=i, **{"max_tokens": 30} | settings) for i in range(10)]
    completions = await answers(engine, requests)
    assert max(len(completion.response_ids) for completion in completions) > 2
    for request, completion in zip(requests, completions, strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_logprobs_are_the_learners_where_requests_of_every_kind_are_computed_together(engine, policy):
    kinds: list[dict[str, Any]] = [
        {}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.3}, {"repetition_penalty": 1.4}, {"min_tokens": 20}, CUTS
    ]  # fmt: skip
    requests = [
        ask(PROMPT, f"{temperature} {i}", seed=i, **{"max_tokens": 24, "temperature": temperature} | kind)
        for temperature in (0.0, 0.6, 1.0, 1.3)
        for i, kind in enumerate(kinds)
    ]
    for request, completion in zip(requests, await answers(engine, requests), strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_greedy_is_transformers_generate(engine, policy):
    import torch

    requests = [ask(text, text, temperature=0, min_tokens=30, max_tokens=30) for text in ("one", "two", PROMPT)]
    module: Any = policy_of(3, tie_word_embeddings=True).module
    module.set_attn_implementation("eager")
    for request, completion in zip(requests, await answers(engine, requests), strict=True):
        prompt = torch.tensor([request.prompt_ids])
        output = module.generate(prompt, do_sample=False, min_new_tokens=29, max_new_tokens=30)
        assert completion.response_ids == output[0, prompt.shape[1] :].tolist()


async def test_same_seed_gives_the_same_tokens_alone_and_in_a_crowd(engine):
    wanted = ask("hello", seed=7, min_tokens=30, max_tokens=30)
    alone = await engine.generate(wanted)
    first, *_ = await answers(engine, [wanted, *(ask("y" * i, f"{i}", seed=i, max_tokens=i) for i in range(1, 20))])
    assert first.response_ids == alone.response_ids
    other = await engine.generate(ask("hello", seed=8, min_tokens=30, max_tokens=30))
    assert other.response_ids != alone.response_ids


@pytest.mark.parametrize("least", [0, 1, 2, 20])
async def test_end_of_sequence_is_kept_and_counts_from_the_last_of_min_tokens(engine, least):
    requests = [ask("a", f"{i}", seed=i, min_tokens=least, max_tokens=200) for i in range(16)]
    completions = await answers(engine, requests)
    for completion in completions:
        assert completion.stop_reason == "stop"
        assert completion.response_ids[-1] in ENDS
        assert set(ENDS).isdisjoint(completion.response_ids[:-1])
    assert min(len(completion.response_ids) for completion in completions) == max(least, 1)


async def test_the_text_has_no_special_tokens(engine):
    completions = await answers(engine, [ask("a", f"{i}", seed=i, max_tokens=50) for i in range(60)])
    ended = [completion for completion in completions if completion.response_ids[-1] >= 256]
    assert ended
    for completion in completions:
        assert completion.text == tiny_tokenizer().decode(completion.response_ids, skip_special_tokens=True)
        assert "<|im" not in completion.text


async def test_max_tokens_ends_with_length(engine):
    completion = await engine.generate(ask("a", min_tokens=5, max_tokens=5))
    assert (len(completion.response_ids), len(completion.logprobs), completion.stop_reason) == (5, 5, "length")


async def test_the_models_context_ends_a_response_with_length(engine):
    assert engine.max_model_len == 512
    completion = await engine.generate(ask("a" * 500, min_tokens=100, max_tokens=100))
    assert (len(completion.response_ids), completion.stop_reason) == (12, "length")


async def test_a_stop_string_across_tokens_ends_the_response_behind_it(engine):
    requests = [ask("a", f"{i}", seed=i, max_tokens=60) for i in range(60)]
    request, ids, behind = next(
        (request, completion.response_ids, at + 3)
        for request, completion in zip(requests, await answers(engine, requests), strict=True)
        for at in range(1, len(completion.response_ids) - 3)
        if "\ufffd" not in tiny_tokenizer().decode(completion.response_ids[at : at + 3])
    )
    stop = tiny_tokenizer().decode(ids[behind - 3 : behind])
    stopped = await engine.generate(replace(request, sampling=replace(request.sampling, stop=("never", stop))))
    assert (stopped.response_ids, stopped.stop_reason) == (ids[:behind], "stop")
    assert len(stopped.logprobs) == behind < len(ids)
    assert stopped.text.endswith(stop)


async def test_a_stop_string_counts_from_the_last_of_min_tokens(engine):
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    free = await engine.generate(ask("a", **settings, min_tokens=40))
    letters = tuple(set(free.text) - {"\ufffd"})
    patient = await engine.generate(ask("a", stop=letters, min_tokens=20, **settings))
    assert 20 <= len(patient.response_ids) < 40
    assert patient.response_ids == free.response_ids[: len(patient.response_ids)]


async def test_a_repetition_penalty_forbids_what_it_makes_unlikely(engine):
    request = ask("abc", temperature=0, min_tokens=40, max_tokens=40)
    strict = replace(request, sampling=replace(request.sampling, repetition_penalty=1e6))
    plain, penalised = await answers(engine, [request, strict])
    assert len(set(plain.response_ids)) < 40
    assert len(set(penalised.response_ids + request.prompt_ids)) == 43  # no token comes twice


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 512, "512 tokens, but prompt and response together may have 512"), ([999], "vocabulary")],
)
async def test_an_impossible_prompt_fails_alone(engine, prompt, message):
    bad, good = await asyncio.gather(
        engine.generate(ask(prompt, "bad")), engine.generate(ask("fine")), return_exceptions=True
    )
    assert isinstance(bad, ValueError)
    assert message in str(bad)
    assert "session bad" in str(bad)
    assert isinstance(good, Completion)


async def test_a_cancelled_request_frees_its_slot(engine):
    running = [asyncio.create_task(engine.generate(ask("a", f"{i}", min_tokens=400, max_tokens=400))) for i in range(8)]
    await asyncio.sleep(0.05)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    async with asyncio.timeout(200):
        completion = await engine.generate(ask("b", max_tokens=2, min_tokens=2))
    assert len(completion.response_ids) == 2
    await engine.forget("a")


async def begun_and_paused(engine: Any, requests: list[Request]) -> list[asyncio.Task[Completion]]:
    """Return requests under way in an engine that is paused. On a busy machine the pause may come too late for some."""
    for _ in range(20):
        begun = [asyncio.create_task(engine.generate(request)) for request in requests]
        await asyncio.sleep(0.05)
        await engine.pause()
        if not any(task.done() for task in begun):
            return begun
        await engine.resume()
        await asyncio.gather(*begun)
    raise AssertionError("no pause came in time")


async def test_a_paused_engine_finishes_nothing_and_loses_nothing(engine):
    requests = [ask("a", f"{i}", seed=i, **LONG) for i in range(10)]  # two wait for a slot
    expected = await answers(engine, requests)
    begun = await begun_and_paused(engine, requests[:9])
    late = asyncio.create_task(engine.generate(requests[9]))
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in [*begun, late])
    seconds = engine.busy_seconds
    assert seconds > 0
    await asyncio.sleep(0.1)
    assert engine.busy_seconds == seconds  # the sign by which an engine that hangs is known
    await engine.pause()  # it is paused already
    await engine.resume()
    async with asyncio.timeout(200):
        completions = await asyncio.gather(*begun, late)
    assert [c.response_ids for c in completions] == [c.response_ids for c in expected]


async def test_a_paused_engine_still_proves_its_weights(engine, policy):
    ids = tiny_tokenizer().encode(PROMPT)
    await engine.pause()
    running = asyncio.create_task(engine.generate(ask("a", max_tokens=1, min_tokens=1)))
    proof = await engine.logprobs_of_tokens(ids)
    await asyncio.sleep(0.05)
    assert not running.done()
    await engine.resume()
    await running
    assert proof == pytest.approx(learner_of(policy, 1).logprobs_of_tokens(ids), abs=1e-4)


async def test_new_weights_reach_the_next_token_and_requests_in_flight_outlive_them(engine, policy):
    other = policy_of(5, tie_word_embeddings=True)
    before = await engine.generate(ask(PROMPT, seed=1, min_tokens=9, max_tokens=9))
    [running] = await begun_and_paused(engine, [ask(PROMPT, "episode", seed=1, **LONG)])
    weights = weights_of()
    await weights.push(learner_of(other, 2), engine)
    request = ask(PROMPT, "late", seed=1, min_tokens=9, max_tokens=9)
    after, mixed = await engine.generate(request), await running
    assert (before.policy_version, mixed.policy_version, after.policy_version) == (1, 1, 2)
    assert before.response_ids != after.response_ids
    assert_learner_agrees(other, request, after)  # no key of the old weights is left in the prefix cache
    assert len(mixed.response_ids) == 200
    tail = learner_of(other, 0).logprobs_of_tokens(request.prompt_ids + mixed.response_ids)[-20:]
    assert mixed.logprobs[-20:] == pytest.approx(tail, abs=1e-3)
    assert weights.metrics["weights/max_logprob_difference"] < 1e-4
