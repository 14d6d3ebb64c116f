"""The policy: packed attention is the family's own attention, for values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.model import Policy, load_policy, wrap_module
from skyrl_train.policy.model_files import load_tokenizer
from skyrl_train.policy.precision import choose_compute_dtype, choose_device
from tests.tiny_models import save_tiny_model, tiny_policy, tiny_tokenizer

LENGTHS = [3, 40, 1, 17, 40, 100]  # out of order, some equal, so that buckets must rearrange and pad


def packed(lengths: list[int], vocab_size: int = 258) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T], positions [T], offsets [S+1] of random samples."""
    ids = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return ids, positions, torch.tensor([0, *lengths]).cumsum(0)


def own_logits(policy: Policy, ids: torch.Tensor, attention: str = "eager") -> torch.Tensor:
    """What transformers computes for one sequence alone."""
    policy.module.set_attn_implementation(attention)
    logits = policy.module(input_ids=ids[None], use_cache=False).logits[0]
    policy.module.set_attn_implementation("skyrl")
    return logits


def packed_logits(policy: Policy, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, positions, offsets = packed(lengths)
    return ids, offsets, policy.logits(policy.hidden_states(ids, positions, PackedAttention(offsets)))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}),
    ],
)
def test_packed_samples_get_the_logits_they_get_alone(family, config):
    policy = tiny_policy(family, **config)
    ids, offsets, logits = packed_logits(policy, LENGTHS)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert_close(logits[start:stop], own_logits(policy, ids[start:stop]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16, 16]])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_packed_gradient_is_the_sum_of_the_samples_gradients(lengths, gradient_checkpointing):
    policy = tiny_policy(gradient_checkpointing=gradient_checkpointing)
    ids, offsets, logits = packed_logits(policy, lengths)
    logits.square().mean(-1).sum().backward()
    alone = tiny_policy()
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        own_logits(alone, ids[start:stop]).square().mean(-1).sum().backward()
    for weight, expected in zip(policy.module.parameters(), alone.module.parameters(), strict=True):
        assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_recomputes_the_layers_in_backward():
    calls = {}
    for checkpointing in (False, True):
        policy = tiny_policy(gradient_checkpointing=checkpointing)
        seen = calls.setdefault(checkpointing, [])
        product = policy.module.get_submodule("model.layers.0.self_attn.q_proj")
        product.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        packed_logits(policy, LENGTHS)[2].sum().backward()
    assert len(calls[False]) == 1
    assert len(calls[True]) == 2


CHANCE: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "mixtral": {"router_jitter_noise": 0.3, "num_local_experts": 4},
    "persimmon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "seed_oss": {"residual_dropout": 0.5},
    "starcoder2": {"embedding_dropout": 0.5, "residual_dropout": 0.5},
    "opt": {"dropout": 0.5, "layerdrop": 0.9, "ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("family", CHANCE)
def test_what_a_family_does_by_chance_in_training_is_off(family):
    """Checkpointed layers are in training mode, in which families drop numbers, drop layers and add noise."""
    expected = packed_logits(tiny_policy(family, **CHANCE[family]), LENGTHS)[2]
    assert_close(
        packed_logits(tiny_policy(family, gradient_checkpointing=True, **CHANCE[family]), LENGTHS)[2], expected
    )


def test_a_family_that_cannot_be_checkpointed_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^CTRLLMHeadModel does not .*gradient_checkpointing=false$"):
        tiny_policy("ctrl", gradient_checkpointing=True, dff=64)


def test_a_head_that_we_would_compute_differently_is_refused():
    policy = tiny_policy()
    original = policy.module.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    policy.module.forward = forward
    with pytest.raises(ValueError, match="behind its output head"):
        wrap_module(policy.module)


def test_attention_with_a_soft_cap_is_refused():
    with pytest.raises(ValueError, match="softcap"):
        tiny_policy("gemma2", attn_logit_softcapping=1.0)


@pytest.mark.filterwarnings("ignore")
def test_a_family_that_ignores_our_attention_is_refused():
    with pytest.raises(ValueError, match="cannot be replaced"):
        tiny_policy("mpt", d_model=32, n_heads=4, n_layers=2)


def test_offsets_that_do_not_fit_the_tokens_are_refused():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="end at 3"):
        policy.hidden_states(torch.zeros(4, dtype=torch.long), torch.arange(4), PackedAttention(torch.tensor([0, 3])))


def test_a_saved_folder_loads_as_the_same_policy(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen2")
    policy = load_policy(folder, device="cpu", compute_dtype=torch.float32)
    assert_close(packed_logits(policy, LENGTHS)[2], packed_logits(tiny_policy("qwen2"), LENGTHS)[2])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hé") == tiny_tokenizer().encode("hé")
    assert tokenizer.eos_token_id == 257


def test_configuration_overrides_reach_the_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    kwargs = {"max_position_embeddings": 99}
    policy = load_policy(folder, device="cpu", compute_dtype=torch.float32, model_config_kwargs=kwargs)
    assert policy.config.max_position_embeddings == 99
    with pytest.raises(ValueError, match="has no 'max_positions'"):
        load_policy(folder, device="cpu", compute_dtype=torch.float32, model_config_kwargs={"max_positions": 99})


def test_a_tokenizer_without_padding_token_pads_with_end_of_sequence(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == 257


def test_the_wanted_compute_dtype_wins():
    assert choose_compute_dtype(torch.device("cpu"), True)[0] == torch.bfloat16
    assert choose_compute_dtype(torch.device("cpu"), False)[0] == torch.float32
    dtype, reason = choose_compute_dtype(torch.device("cpu"), None)
    assert str(dtype).removeprefix("torch.") in reason


def test_an_unknown_device_is_refused_with_what_to_write_instead():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="use auto, cpu or cuda"):
        choose_device("mps")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="no CUDA GPU"):
            choose_device("cuda")
