from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.engine.torch.decoder import Decoder, forward_pass
from skyrl_train.learner.model import PackedAttention, Policy
from tests.skyrl_train.engine.conftest import answers, ask
from tests.tiny_models import tiny_policy

POSITIONS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0])
OFFSETS = torch.tensor([0, 5, 8, 9])


def logits_of(model, policy: Policy) -> torch.Tensor:
    ids = torch.randint(policy.config.vocab_size, (9,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.logits(model.hidden_states(ids, POSITIONS, PackedAttention(OFFSETS)))


def decoder_of(policy: Policy) -> Decoder:
    model = forward_pass(policy)
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),
        ("mistral", {"sliding_window": 3}),
    ],
)
def test_the_decoder_computes_what_the_policy_computes(family: str, config: dict) -> None:
    policy = tiny_policy(family, **config)
    assert_close(logits_of(decoder_of(policy), policy), logits_of(policy, policy), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_policy_is(family: str) -> None:
    exact_policy, policy = tiny_policy(family), tiny_policy(family, compute_dtype=torch.bfloat16)
    exact = logits_of(exact_policy, exact_policy)
    ours, theirs = (logits_of(model, policy).float() - exact for model in (decoder_of(policy), policy))
    assert ours.norm() < 1.5 * theirs.norm()


@torch.no_grad()
def test_changed_weights_count_once_it_is_told() -> None:
    policy = tiny_policy()
    decoder = decoder_of(policy)
    for parameter in policy.module.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    assert (logits_of(decoder, policy) - logits_of(policy, policy)).abs().max() > 0.01
    decoder.weights_changed()
    assert_close(logits_of(decoder, policy), logits_of(policy, policy), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "config"), [("gpt2", {}), ("llama", {"hidden_act": "gelu"})])
def test_other_families_are_computed_by_the_policy_itself(family: str, config: dict) -> None:
    policy = tiny_policy(family, **config)
    assert forward_pass(policy) is policy


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
