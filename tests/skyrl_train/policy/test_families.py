"""Every causal family of transformers: engine, learner and transformers agree on it, or it is refused by its name."""

from __future__ import annotations

import asyncio
import re

import pytest
import torch

from skyrl_train.engine.base import Completion, Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.model import Policy, wrap_module
from skyrl_train.policy.refusal import ModelRefused
from tests.families import FAMILIES, CannotBuild, tiny_family
from tests.tiny_models import tiny_module, tiny_policy, tiny_tokenizer

PROMPT_LENGTHS = 30, 70, 5  # with 20 sampled tokens each: shorter and longer than the windows of 24
AGREE = {
    "afmoe", "apertus", "arcee", "aria_text", "bert-generation", "biogpt", "bitnet", "cohere", "cohere2",
    "cohere2_moe", "ctrl", "cwm", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo",
    "gemma", "gemma3", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2", "gpt_neox",
    "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hyperclovax", "jais2", "laguna", "lfm2", "llama", "mellum", "minimax_m2", "minimax_m3_vl_text", "ministral",
    "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi",
    "phi3", "phi4_multimodal", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open",
    "starcoder2",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_family_agrees_or_is_refused_by_name(family: str) -> None:
    try:
        module = tiny_family(family)
    except CannotBuild as reason:
        assert family not in AGREE
        pytest.skip(str(reason))
    prompts = [_random_ids(length) for length in PROMPT_LENGTHS]
    try:
        policy = wrap_module(module)
        completions = asyncio.run(sampled(policy, prompts))
    except ModelRefused as refusal:
        reason = str(refusal)
    else:
        assert family in AGREE
        assert_all_agree(policy, prompts, completions)
        return
    assert family not in AGREE, reason
    assert re.match(rf"{type(module).__name__} is not supported: .{{20,}}", reason)


async def sampled(policy: Policy, prompts: list[list[int]], max_length: int | None = None) -> list[Completion]:
    engine = TorchEngine(policy, tiny_tokenizer(), max_num_seqs=8, max_num_batched_tokens=48, max_model_len=max_length)
    params = SamplingParams(max_tokens=20, min_tokens=20)
    try:
        requests = [Request(prompt, params, f"s{i}") for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*(engine.generate(request) for request in requests))
    finally:
        await engine.close()


@torch.inference_mode()
def assert_all_agree(policy: Policy, prompts: list[list[int]], completions: list[Completion]) -> None:
    """Logprobs of the sampled tokens: the engine's, the learner's with all packed, and transformers' of each alone."""
    samples = [torch.tensor(p + c.response_ids) for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(sample) for sample in samples]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0))
    packed = policy.logits(policy.hidden_states(torch.cat(samples), positions, attention)).split(lengths)
    policy.module.set_attn_implementation("eager")
    for sample, logits, completion in zip(samples, packed, completions, strict=True):
        theirs = policy.module(input_ids=sample[None], use_cache=False).logits[0]
        ours, expected = (x.log_softmax(-1)[:-1].gather(1, sample[1:, None])[:, 0] for x in (logits, theirs))
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), ours[-20:], atol=1e-3, rtol=0)
    policy.module.set_attn_implementation("skyrl")


def _random_ids(length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()


LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4, "factor": 8.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_rotary_embeddings_that_depend_on_the_longest_sequence_are_refused_where_a_run_could_reach_it() -> None:
    module = tiny_module("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    for max_length in (None, 65):
        with pytest.raises(ModelRefused, match=r"Phi3ForCausalLM .*'longrope'.*max_generate_length within 64 tokens"):
            wrap_module(module, max_length=max_length)
    policy = wrap_module(module, max_length=64)
    prompts = [_random_ids(length) for length in (44, 10)]
    assert_all_agree(policy, prompts, asyncio.run(sampled(policy, prompts, max_length=64)))


@pytest.mark.parametrize("error", [NameError, UnboundLocalError, StopIteration, SyntaxError, KeyError])
def test_a_family_whose_code_fails_in_any_way_is_refused_by_name(error: type[Exception]) -> None:
    """transformers' longrope with a kind of embedding per kind of layer fails of an UnboundLocalError, say."""
    module = tiny_module("llama")

    def fails(*_: object, **__: object) -> None:
        raise error("no value")

    module.model.rotary_emb.forward = fails
    with pytest.raises(ModelRefused, match=rf"^LlamaForCausalLM is not supported: .*\({error.__name__}: .*no value"):
        wrap_module(module)


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn", "llama3"])
def test_rotary_embeddings_that_depend_on_the_position_alone_are_supported(kind: str) -> None:
    rotary = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {} if kind == "dynamic" else {"original_max_position_embeddings": 64}
    policy = tiny_policy(rope_parameters=rotary | original)
    prompts = [_random_ids(length) for length in (480, 10)]  # to the end of the context and far from it
    assert_all_agree(policy, prompts, asyncio.run(sampled(policy, prompts)))


def test_a_position_embedding_of_any_kind_that_looks_at_the_longest_sequence_is_refused() -> None:
    module = tiny_module("llama")
    rotary = module.model.rotary_emb
    original = rotary.forward
    rotary.forward = lambda x, position_ids: original(x, position_ids * (1 + (position_ids.max() >= 300)))
    with pytest.raises(ModelRefused, match="depends on the longest sequence"):
        wrap_module(module)
    wrap_module(module, max_length=300)


def test_a_window_that_only_long_samples_feel_is_checked() -> None:
    """The family passes no window on, so that our attention sees everything; transformers' mask does not."""
    with pytest.raises(ModelRefused, match=r"PhimoeForCausalLM .*samples of 512 tokens"):
        wrap_module(tiny_module("phimoe", sliding_window=100))
    wrap_module(tiny_module("phimoe", sliding_window=100), max_length=100)


def test_what_goes_wrong_only_beside_others_in_a_packed_row_is_checked() -> None:
    module = tiny_module("gemma")
    layer = module.model.layers[1]
    original = layer.mlp.forward
    layer.mlp.forward = lambda x: original(x) + 0.1 * x.roll(1, 1) * (x.shape[1] > 400)
    with pytest.raises(ModelRefused, match="samples of"):
        wrap_module(module)


def test_an_engine_that_would_compute_other_numbers_is_refused() -> None:
    policy = tiny_policy("gemma")  # computed by the policy itself
    norm = policy.module.model.norm
    original = norm.forward
    norm.forward = lambda x: original(x) * (1 + (x.shape[1] < 30))
    with pytest.raises(ModelRefused, match=r"GemmaForCausalLM .*over a cache it computes other numbers"):
        TorchEngine(policy, tiny_tokenizer(), max_num_seqs=2, max_num_batched_tokens=48)
