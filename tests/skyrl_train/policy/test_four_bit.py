"""Frozen weights in 4 bits: every reader sees the same matrix, and adapters on them learn as on that matrix."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from skyrl_train.config import LoraConfig
from skyrl_train.policy.lora import BaseUnderAdapters, LoraLinear, add_adapters, effective_weight, merged_weights
from skyrl_train.policy.lora_files import save_merged
from skyrl_train.policy.memory_plan import FOUR_BIT_BYTES
from skyrl_train.policy.model import Policy, load_policy
from skyrl_train.policy.model_files import load_module
from tests.skyrl_train.batches import random_batch
from tests.skyrl_train.engine.conftest import answers, ask
from tests.skyrl_train.engine.conftest import make_engine as make_engine
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config
from tests.skyrl_train.policy.test_lora import trained
from tests.tiny_models import save_tiny_model, tiny_module, tiny_policy

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: uv sync --inexact --extra quantized")
from skyrl_train.policy.four_bit import (
    BYTES_PER_NUMBER,
    FourBitLinear,
    FourBitMatrix,
    four_bit_matrices,
    freeze_in_four_bits,
)

# QLoRA, Dettmers et al. (2023), appendix E: the numbers of NormalFloat
NORMAL_FLOAT = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def quantized(family: str = "llama", *, rank: int = 4, **config: Any) -> Policy:
    """Return a tiny policy with adapters on weights in 4 bits."""
    policy = tiny_policy(family, **config)
    freeze_in_four_bits(policy.module, "cpu")
    add_adapters(policy, LoraConfig(rank=rank, alpha=8), seed=1)
    return policy


def on_the_same_numbers(family: str = "llama", **config: Any) -> Policy:
    """Return a policy with the same adapters on whole weights: those that the 4 bits stand for."""
    policy = tiny_policy(family, **config)
    four_bit = tiny_policy(family, **config)
    freeze_in_four_bits(four_bit.module, "cpu")
    for name, matrix in four_bit_matrices(four_bit.module).items():
        policy.weights[f"{name}.weight"].data.copy_(matrix.whole())
    add_adapters(policy, LoraConfig(rank=4, alpha=8), seed=1)
    return policy


@pytest.mark.parametrize("shape", [(8, 128), (6, 32), (64, 7), (5, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_becomes_the_nearest_of_normal_float_times_the_largest_of_its_block(dtype, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers = matrix.float().flatten()
    blocks = torch.cat([numbers, torch.zeros(-len(numbers) % 64)]).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - NORMAL_FLOAT).abs().argmin(-1)
    expected = (NORMAL_FLOAT[nearest] * largest).flatten()[: len(numbers)].view(shape)
    found = FourBitMatrix(matrix).whole()
    assert found.dtype == dtype
    assert_close(found.float(), expected, rtol=0.04, atol=1e-6)  # the scales have 8 bits


def test_a_matrix_takes_4_13_bits_a_number():
    matrix = FourBitMatrix(torch.randn(256, 256))
    # half a byte, a scale of a byte for 64, and a float32 for 256 scales: 32,768 + 1,024 + 16
    assert matrix.num_bytes == int(256 * 256 * BYTES_PER_NUMBER) == 33_808
    assert BYTES_PER_NUMBER == FOUR_BIT_BYTES  # of the memory plan


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_matrix_that_the_bits_stand_for(bias):
    torch.manual_seed(0)
    plain = nn.Linear(64, 8, bias=bias).requires_grad_(False)
    layer = FourBitLinear(plain, torch.device("cpu"))
    plain.weight.copy_(layer.weight)
    rows, same = (torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    ours, theirs = layer(rows), plain(same)
    assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_close(rows.grad, same.grad)
    assert not list(FourBitLinear(nn.Linear(64, 8, bias=False), torch.device("cpu")).parameters())


def test_backward_keeps_no_whole_matrix():
    policy = quantized()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer = policy.module.model.layers[0].mlp.down_proj
    rows = torch.randn(5, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(rows)
    assert {tuple(tensor.shape) for tensor in kept} == {(5, 64), (5, 4), (4, 64), (32, 4)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_updates_are_those_of_adapters_on_the_same_numbers(family, gradient_checkpointing):
    config = trainer_config({"kl_loss_coef": 0.1}, update_epochs_per_batch=2)
    results = []
    for make in (quantized, on_the_same_numbers):
        policy = make(family, gradient_checkpointing=gradient_checkpointing)
        learner = learner_for(config, policy=policy, reference=BaseUnderAdapters.of(policy))
        for seed in range(2):
            metrics = learner.update(prepared(learner, config, random_batch(seed=seed)))
        results.append((trained(policy), metrics["policy/policy_kl"]))
    (ours, our_kl), (theirs, their_kl) = results
    assert ours.keys() == theirs.keys()
    assert our_kl == pytest.approx(their_kl, rel=1e-5)
    assert their_kl > 1e-3
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "granite"])  # the packed decoder, and the module itself
async def test_after_every_update_the_engine_samples_with_the_learners_logprobs(make_engine, family):
    settings = trainer_config()
    policy = quantized(family)
    learner, engine = learner_for(settings, policy=policy), make_engine(policy)
    for version in range(1, 3):
        learner.update(prepared(learner, settings))
        await engine.weights_changed(version)
        [done] = await answers(engine, [ask("ab", temperature=1.0, max_tokens=10)])
        ids = [*ask("ab").prompt_ids, *done.response_ids]
        expected = learner.logprobs_of_tokens(ids)[-len(done.response_ids) :]
        assert_close(torch.tensor(done.logprobs), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_what_is_published_and_exported_is_what_the_learner_computes_with(tmp_path):
    policy, plain = quantized("qwen2"), tiny_policy("qwen2")
    learner, config = learner_for(trainer_config(), policy=policy), trainer_config()
    learner.update(prepared(learner, config))
    published = dict(merged_weights(policy.module))
    assert published.keys() == plain.weights.keys()
    layer = policy.module.model.layers[1].mlp.up_proj
    assert isinstance(layer, LoraLinear)
    assert torch.equal(published["model.layers.1.mlp.up_proj.weight"], effective_weight(layer))
    save_merged(policy.module, tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert loaded.keys() == published.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in published.items())


def test_layers_without_an_adapter_rest_in_four_bits_too():
    policy = tiny_policy()
    freeze_in_four_bits(policy.module, "cpu")
    add_adapters(policy, LoraConfig(rank=4, exclude_modules=["down_proj"]), seed=1)
    assert len(four_bit_matrices(policy.module)) == 2 * 7
    published = dict(merged_weights(policy.module))
    assert published.keys() == tiny_policy().weights.keys()
    config = trainer_config()
    learner = learner_for(config, policy=policy)
    assert learner.update(prepared(learner, config))["policy/grad_norm"] > 0


def test_adapters_on_four_bits_learn_as_adapters_on_whole_weights():
    """Twenty steps on one batch: what was rewarded gains at least 0.8 of what it gains on the whole weights."""
    gains = []
    for policy in (quantized(), tiny_policy()):
        if not four_bit_matrices(policy.module):
            add_adapters(policy, LoraConfig(rank=4, alpha=8), seed=1)
        config = trainer_config(optimizer={"lr": 3e-3})
        learner = learner_for(config, policy=policy)
        batch = prepared(learner, config)
        better = batch.loss_mask & (batch.advantages > 0)
        before = learner._logprobs(policy, batch)
        for _ in range(20):
            learner.update(batch)
        gains.append(float((learner._logprobs(policy, batch) - before)[better].mean()))
    four_bit, whole = gains
    assert whole > 0.1
    assert four_bit == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_freezes_every_linear_layer_but_the_head(dtype, tmp_path):
    folder = save_tiny_model(tmp_path, "qwen3")
    policy = load_policy(folder, device="cpu", compute_dtype=dtype, four_bit=True)
    assert len(four_bit_matrices(policy.module)) == 2 * 7
    assert type(policy.module.get_output_embeddings()) is nn.Linear
    again = load_policy(folder, device="cpu", compute_dtype=dtype, four_bit=True)
    for ours, theirs in zip(
        four_bit_matrices(policy.module).values(), four_bit_matrices(again.module).values(), strict=True
    ):
        assert torch.equal(ours.whole(), theirs.whole())  # so a resumed run computes with the same numbers


def test_without_the_library_it_says_how_to_install_it(tmp_path, monkeypatch):
    module = load_module(save_tiny_model(tmp_path), torch.float32, {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="uv sync --inexact --extra quantized"):
        freeze_in_four_bits(module, "cpu")


def test_a_model_without_linear_layers_is_left_alone():
    module = tiny_module("gpt2")
    freeze_in_four_bits(module, "cpu")
    assert not four_bit_matrices(module)
