from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.engine.torch.forward import forward_pass, prompts_and_steps
from skyrl_train.ops.base import Decoder
from skyrl_train.ops.cpu.decode_kernels import DecodeKernels, NoKernels, Shape
from skyrl_train.ops.cpu.decoder import PackedDecoder, decoders
from skyrl_train.policy.lora import effective_weight
from skyrl_train.policy.model import Policy
from tests.skyrl_train.engine.conftest import answers, ask
from tests.tiny_models import tiny_policy

FAMILIES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    ("mistral", {"sliding_window": 3}),
]


@torch.inference_mode()
def logits_of(model: Decoder, policy: Policy) -> torch.Tensor:
    return prompts_and_steps(model, policy)


def decoders_of(policy: Policy) -> list[PackedDecoder]:
    """The one with compiled kernels, if there is a C compiler, then the one without."""
    return [decoder for decoder, _ in decoders(policy.module, effective_weight)]


def has_tiles() -> bool:
    kernels = decoders_of(tiny_policy(compute_dtype=torch.bfloat16))[0].kernels
    return kernels is not None and kernels.has_tiles


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_the_decoder_computes_what_the_policy_computes(family: str, config: dict, compiled: bool) -> None:
    policy = tiny_policy(family, **config)
    decoder = decoders_of(policy)[0 if compiled else -1]
    if compiled and decoder.kernels is None:
        pytest.skip("no C compiler here")
    assert_close(logits_of(decoder, policy), logits_of(policy, policy), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True}),
        ("qwen3", {}),
        ("qwen2", {"vocab_size": 288}),  # its head fits tiles
        ("mistral", {"sliding_window": 7}),
        ("llama", {"intermediate_size": 72}),  # fits none
    ],
)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_policy_is(family: str, config: dict) -> None:
    exact_policy, policy = tiny_policy(family, **config), tiny_policy(family, compute_dtype=torch.bfloat16, **config)
    exact = logits_of(exact_policy, exact_policy)
    theirs = (logits_of(policy, policy).float() - exact).norm()
    for decoder in decoders_of(policy):
        assert (logits_of(decoder, policy).float() - exact).norm() < 1.5 * theirs


@pytest.mark.skipif(not has_tiles(), reason="no AMX, or no C compiler")
def test_with_tiles_all_layers_of_short_chunks_are_one_call(monkeypatch) -> None:
    policy, sizes = tiny_policy(compute_dtype=torch.bfloat16), []
    decode = DecodeKernels.decode
    monkeypatch.setattr(
        DecodeKernels, "decode", lambda self, *given: sizes.append(len(given[6])) or decode(self, *given)
    )
    logits_of(decoders_of(policy)[0], policy)
    assert sizes == [15 + 9, 2]  # and not the step beside a long prompt


@torch.no_grad()
def test_changed_weights_count_once_it_is_told() -> None:
    policy = tiny_policy()
    decoder = decoders_of(policy)[-1]
    for parameter in policy.module.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    assert (logits_of(decoder, policy) - logits_of(policy, policy)).abs().max() > 0.01
    decoder.weights_changed()
    assert_close(logits_of(decoder, policy), logits_of(policy, policy), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "config"), [("gpt2", {}), ("llama", {"hidden_act": "gelu"})])
def test_other_families_are_computed_by_the_policy_itself(family: str, config: dict) -> None:
    policy = tiny_policy(family, **config)
    assert forward_pass(policy) == (policy, None)


@pytest.mark.parametrize(
    ("compiler", "reason"), [("false", "cannot build decode.c"), ("/no/such/compiler", "No such file")]
)
def test_without_a_compiler_that_works_the_decoder_does_without_kernels(monkeypatch, compiler, reason) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NoKernels, match=reason):
        DecodeKernels(Shape(4, 2, 8, torch.float32))
    decoder, draw = forward_pass(tiny_policy())
    assert isinstance(decoder, PackedDecoder)
    assert draw is None


async def test_the_engine_samples_from_the_new_weights_after_an_update(make_engine) -> None:
    policy = tiny_policy()
    engine = make_engine(policy)
    [before] = await answers(engine, [ask("ab", temperature=0)])
    with torch.no_grad():
        policy.module.get_parameter("model.embed_tokens.weight").mul_(-1)
    await engine.weights_changed(1)
    [after] = await answers(engine, [ask("ab", temperature=0)])
    [fresh] = await answers(make_engine(policy), [ask("ab", temperature=0)])
    assert after.response_ids == fresh.response_ids != before.response_ids
