"""The blocks that we compute in few passes are Hugging Face's: values and gradients, for every family."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.blocks import FAMILIES
from skyrl_train.policy.model import wrap_module
from tests.skyrl_train.learner.test_learner import relative_difference
from tests.tiny_models import tiny_module, tiny_policy

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),  # biases on queries, keys and values
    ("qwen3", {}),  # queries and keys are normed
]


def loss_and_gradient(module: nn.Module, **call: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(258, (1, 40), generator=torch.Generator().manual_seed(1))
    logits = module(input_ids=ids, position_ids=torch.arange(40)[None], use_cache=False, **call).logits[0]
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * pull).sum().backward()
    return logits.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_values_and_gradients_are_those_of_transformers(family, config):
    plain = with_random_vectors(tiny_module(family, **config))
    ours = wrap_module(with_random_vectors(tiny_module(family, **config))).module
    assert all("forward" in vars(block) for block in cast(Any, ours.base_model).layers)
    plain.set_attn_implementation("eager")
    logits, gradient = loss_and_gradient(ours, attention=PackedAttention(torch.tensor([0, 40])))
    expected, expected_gradient = loss_and_gradient(plain)
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradient.keys() == expected_gradient.keys()
    assert relative_difference(gradient, expected_gradient) < 1e-5
    for name, theirs in expected_gradient.items():
        assert relative_difference({name: gradient[name]}, {name: theirs}) < 1e-4, name


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_without_a_compiler_they_are_too(family, config, no_compiler):
    test_values_and_gradients_are_those_of_transformers(family, config)


def with_random_vectors(module: Any) -> Any:
    """Norms and biases start as ones and zeros, where a mistake could hide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def test_in_bfloat16_the_gradient_is_as_close_to_the_true_one_as_that_of_transformers():
    attention = {"attention": PackedAttention(torch.tensor([0, 40]))}
    _, true_gradient = loss_and_gradient(tiny_policy("qwen3").module, **attention)
    _, gradient = loss_and_gradient(tiny_policy("qwen3", compute_dtype=torch.bfloat16).module, **attention)
    theirs = tiny_module("qwen3").to(torch.bfloat16)
    theirs.set_attn_implementation("sdpa")
    _, their_gradient = loss_and_gradient(theirs)
    assert relative_difference(gradient, true_gradient) < 1.2 * relative_difference(their_gradient, true_gradient)


def test_parameters_keep_their_names_and_other_families_their_code():
    names = set(tiny_module("qwen3").state_dict())
    assert set(tiny_policy("qwen3").module.state_dict()) == names
    other = tiny_policy("granite")
    assert other.config.model_type not in FAMILIES
    assert not any("forward" in vars(part) for part in other.module.modules())
