"""What the engine samples: the policy's own tokens and logprobs, whatever is batched, shared, kept or chunked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.engine.base import Completion, Request
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.model import Policy
from tests.skyrl_train.engine.conftest import answers, ask, until_step
from tests.tiny_models import tiny_policy, tiny_tokenizer

PROMPT = "a prompt that is long enough to be shared: "  # 43 tokens, one per byte
FAMILIES = [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 24})]


def learner_logprobs(policy: Policy, prompt_ids: list[int], response_ids: list[int], temperature: float) -> list[float]:
    """As the learner computes them: one packed forward, shifted by one."""
    ids = torch.tensor(prompt_ids + response_ids, device=policy.device)
    with torch.no_grad():
        attention = PackedAttention(torch.tensor([0, len(ids)], device=policy.device))
        positions = torch.arange(len(ids), device=policy.device)
        logits = policy.logits(policy.hidden_states(ids, positions, attention)).float()
    logprobs = (logits / temperature).log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
    return logprobs[len(prompt_ids) - 1 :].tolist()


def assert_learner_agrees(policy: Policy, request: Request, completion: Completion) -> None:
    temperature = request.sampling.temperature or 1.0
    expected = learner_logprobs(policy, request.prompt_ids, completion.response_ids, temperature)
    assert_close(completion.logprobs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
async def test_logprobs_are_the_learners(make_engine, family, config):
    policy = tiny_policy(family, **config)
    engine = make_engine(policy, max_num_seqs=4)
    requests = [ask(PROMPT + "x" * i, f"s{i}", seed=i, temperature=0.5 + 0.25 * i, max_tokens=40) for i in range(7)]
    for request, completion in zip(requests, await answers(engine, requests), strict=True):
        assert_learner_agrees(policy, request, completion)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
async def test_greedy_is_transformers_generate(make_engine, family, config):
    policy = tiny_policy(family, **config)
    requests = [ask(text, text, temperature=0, max_tokens=30) for text in ("one", "two, longer", PROMPT)]
    completions = await answers(make_engine(policy), requests)
    module: Any = policy.module
    module.set_attn_implementation("eager")
    for request, completion in zip(requests, completions, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        output = module.generate(prompt, do_sample=False, max_new_tokens=30)
        assert completion.response_ids == output[0, prompt.shape[1] :].tolist()


async def test_same_seed_gives_the_same_tokens_alone_and_in_a_crowd(make_engine):
    engine = make_engine()
    alone = await engine.generate(ask("hello", seed=7, max_tokens=30))
    crowd = [ask("hello", seed=7, max_tokens=30), *(ask("y" * i, f"{i}", seed=i, max_tokens=i) for i in range(1, 20))]
    first, *_ = await answers(engine, crowd)
    assert first.response_ids == alone.response_ids
    other = await engine.generate(ask("hello", seed=8, max_tokens=30))
    assert other.response_ids != alone.response_ids


async def test_a_groups_prompt_is_computed_once(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy, max_num_seqs=4)  # half of the group waits for a slot
    requests = [ask(PROMPT, f"s{i}", seed=i) for i in range(8)]
    completions = await answers(engine, requests)
    num_prompt, stats = len(requests[0].prompt_ids), engine.stats()
    # The first member computes it all, every other one only the last prompt token.
    assert stats.prompt_tokens_computed == num_prompt + 7
    assert stats.tokens_reused == 7 * (num_prompt - 1)
    assert stats.tokens_sampled == sum(len(completion.response_ids) for completion in completions)
    assert len({tuple(completion.response_ids) for completion in completions}) > 1
    for request, completion in zip(requests, completions, strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_prompts_with_a_common_beginning_share_it(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy)
    requests = [ask(PROMPT + "first", "a"), ask(PROMPT + "second", "b"), ask(PROMPT + "third", "c")]
    completions = await answers(engine, requests)
    assert engine.stats().prompt_tokens_computed == len(PROMPT) + len("first") + len("second") + len("third")
    for request, completion in zip(requests, completions, strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_the_next_turn_computes_only_what_is_new(make_engine):
    policy = tiny_policy()
    engine, fresh = make_engine(policy), make_engine(policy)
    first = ask(PROMPT, "episode", max_tokens=10)
    reply = await engine.generate(first)
    observation = tiny_tokenizer().encode("and the world said")
    second = ask([*first.prompt_ids, *reply.response_ids, *observation], "episode", seed=3)
    before = engine.stats()
    completion = await engine.generate(second)
    after = engine.stats()
    # The last sampled token was never fed to the model, so it is computed with the observation.
    assert after.prompt_tokens_computed - before.prompt_tokens_computed == 1 + len(observation)
    assert after.tokens_reused - before.tokens_reused == len(first.prompt_ids) + len(reply.response_ids) - 1
    assert completion.response_ids == (await fresh.generate(second)).response_ids
    assert_learner_agrees(policy, second, completion)


async def test_an_edited_history_reuses_the_common_beginning(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy)
    await engine.generate(ask(PROMPT + "old end", "episode"))
    edited = ask(PROMPT + "new end", "episode")
    completion = await engine.generate(edited)
    assert engine.stats().tokens_reused == len(PROMPT)
    assert_learner_agrees(policy, edited, completion)


async def test_a_forgotten_session_starts_over(make_engine):
    engine = make_engine()
    await engine.generate(ask(PROMPT, "episode"))
    await engine.forget("episode")
    await engine.forget("never seen")
    await engine.generate(ask(PROMPT, "episode"))
    assert engine.stats().tokens_reused == 0


async def test_sessions_are_kept_within_their_budget(make_engine):
    # 43 + 12 - 1 tokens of 2 layers x (key, value) x 2 heads x 8 numbers x 4 bytes = 13,824 bytes for a session
    engine = make_engine(session_cache_bytes=20_000)
    await engine.generate(ask("1" + PROMPT, "first", min_tokens=12))
    await engine.generate(ask("2" + PROMPT, "second", min_tokens=12))
    await engine.generate(ask("1" + PROMPT, "first", min_tokens=12))
    assert engine.stats().tokens_reused == 0
    await engine.generate(ask("1" + PROMPT, "first", min_tokens=12))
    assert engine.stats().tokens_reused == len(PROMPT)


async def test_new_weights_drop_every_cached_key_and_stamp_the_version(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy)
    before = await engine.generate(ask(PROMPT, "episode"))
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.mul_(1.5)
    await engine.weights_changed(5)
    request = ask(PROMPT, "episode")
    after = await engine.generate(request)
    assert (before.policy_version, after.policy_version) == (0, 5)
    assert engine.stats().tokens_reused == 0
    assert_learner_agrees(policy, request, after)


async def test_new_weights_in_mid_response_recompute_it(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy)
    request = ask(PROMPT, min_tokens=400, max_tokens=400)
    running = asyncio.create_task(engine.generate(request))
    await until_step(engine, 5)
    await engine.weights_changed(1)
    completion = await running
    assert completion.policy_version == 0  # its first tokens are that old
    assert engine.stats().prompt_tokens_computed == 2 * len(request.prompt_ids)
    assert_learner_agrees(policy, request, completion)


@pytest.mark.parametrize("budget", [1, 7, 64])
async def test_a_prompt_above_the_token_budget_is_computed_in_chunks(make_engine, budget):
    policy = tiny_policy()
    engine = make_engine(policy, max_num_batched_tokens=budget)
    requests = [ask(letter * 100, letter, seed=1) for letter in "abc"]
    completions = await answers(engine, requests)
    assert engine.stats().prompt_tokens_computed == 300
    for request, completion in zip(requests, completions, strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_a_sequence_longer_than_the_cache_makes_it_grow(make_engine):
    policy = tiny_policy()
    request = ask("x", min_tokens=400, max_tokens=400)  # the cache begins with room for 130 tokens, rounded up
    short = [ask("y" * 20, f"{i}", seed=i) for i in range(3)]
    completion, *_ = await answers(make_engine(policy), [request, *short])
    assert len(completion.response_ids) == 400
    assert_learner_agrees(policy, request, completion)


async def test_bfloat16_logprobs_stay_close_to_the_learners(make_engine):
    policy = tiny_policy(compute_dtype=torch.bfloat16)
    request = ask(PROMPT, max_tokens=40)
    completion = await make_engine(policy).generate(request)
    expected = learner_logprobs(policy, request.prompt_ids, completion.response_ids, 1.0)
    assert torch.tensor(completion.logprobs).sub(torch.tensor(expected)).abs().mean() < 0.05


async def test_end_of_sequence_is_kept_and_waits_for_min_tokens(make_engine):
    policy = tiny_policy()
    ends = set(range(150, 258))
    policy.module.generation_config.eos_token_id = sorted(ends - {257})  # 257 is the tokenizer's own
    engine = make_engine(policy)
    completions = await answers(
        engine, [ask("a", min_tokens=0, max_tokens=200), ask("a", min_tokens=20, max_tokens=200)]
    )
    for completion, least in zip(completions, (1, 20), strict=True):
        assert completion.stop_reason == "stop"
        assert completion.response_ids[-1] in ends
        assert ends.isdisjoint(completion.response_ids[:-1])
        assert len(completion.response_ids) >= least
    assert len(completions[0].response_ids) < 20


async def test_the_text_has_no_special_tokens(make_engine):
    policy = tiny_policy()
    policy.module.generation_config.eos_token_id = None
    with torch.no_grad():
        policy.module.get_output_embeddings().weight[:257].zero_()  # the end of sequence, or anything
    completion = await make_engine(policy).generate(ask("a", temperature=0.01, max_tokens=200))
    assert completion.response_ids[-1] == 257
    assert completion.text == tiny_tokenizer().decode(completion.response_ids[:-1], skip_special_tokens=True)


async def test_max_tokens_ends_with_length(make_engine):
    completion = await make_engine().generate(ask("a", min_tokens=5, max_tokens=5))
    assert (len(completion.response_ids), len(completion.logprobs), completion.stop_reason) == (5, 5, "length")


async def test_the_models_context_ends_a_response_with_length(make_engine):
    request = ask("a" * 20, min_tokens=100, max_tokens=100)
    completion = await make_engine(max_model_len=32).generate(request)
    assert (len(completion.response_ids), completion.stop_reason) == (12, "length")


async def test_a_stop_string_across_tokens_ends_the_response_behind_it(make_engine):
    engine = make_engine()
    free = await engine.generate(ask("a", seed=2, max_tokens=60))
    ids, decode = free.response_ids, tiny_tokenizer().decode
    at = next(i for i in range(10, 58) if "\ufffd" not in decode(ids[i : i + 3]) and max(ids[i : i + 3]) < 256)
    stop = decode(ids[at : at + 3])
    assert free.text.count(stop) == 1
    stopped = await engine.generate(ask("a", seed=2, max_tokens=60, stop=("never", stop)))
    assert stopped.stop_reason == "stop"
    assert stopped.text.endswith(stop)
    assert stopped.response_ids == ids[: at + 3]


async def test_a_stop_string_does_not_count_before_min_tokens(make_engine):
    engine = make_engine()
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    free = await engine.generate(ask("a", **greedy))
    letters = tuple(set(free.text) - {"\ufffd"})
    stopped = await engine.generate(ask("a", stop=letters, **greedy))
    patient = await engine.generate(ask("a", stop=letters, min_tokens=20, **greedy))
    assert len(stopped.response_ids) < 20 <= len(patient.response_ids)
    assert patient.response_ids == free.response_ids[: len(patient.response_ids)]


async def test_a_repetition_penalty_forbids_what_it_makes_unlikely(make_engine):
    request = ask("abc", temperature=0, min_tokens=40, max_tokens=40)
    engine = make_engine()
    strict = replace(request, sampling=replace(request.sampling, repetition_penalty=1e6))
    plain, penalised = await answers(engine, [request, strict])
    assert len(set(plain.response_ids)) < 40
    assert len(set(penalised.response_ids + request.prompt_ids)) == 43  # no token comes twice


async def test_logprobs_are_those_before_the_filters(make_engine):
    policy = tiny_policy()
    engine = make_engine(policy)
    cut = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}
    requests = [ask(PROMPT, f"{i}", seed=i, temperature=0.7, **cut) for i in range(3)]
    for request, completion in zip(requests, await answers(engine, requests), strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_the_learner_can_train_on_the_module_after_sampling(make_engine):
    policy = tiny_policy(gradient_checkpointing=True)
    await make_engine(policy).generate(ask(PROMPT))
    ids = torch.arange(20)
    hidden = policy.hidden_states(ids, ids, PackedAttention(torch.tensor([0, 20])))
    policy.logits(hidden).sum().backward()
    assert all(weight.grad is not None for weight in policy.module.parameters())
