"""Adapters: only they learn, the base is the reference, and engine and learner see the same sum of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from skyrl_train.config import LoraConfig
from skyrl_train.config.models import LORA_STARTS
from skyrl_train.learner.adamw import MOMENTS
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.lora import (
    STARTS,
    BaseUnderAdapters,
    LoraLinear,
    NoSuchModules,
    adapters_of,
    add_adapters,
    effective_weight,
)
from skyrl_train.policy.model import Policy
from tests.skyrl_train.batches import random_batch, shared_batch
from tests.skyrl_train.learner.test_learner import learner_for, prepared, relative_difference, trainer_config
from tests.skyrl_train.learner.test_shared_prefix import logprobs_and_gradient, one_by_one, pull_on
from tests.tiny_models import tiny_policy

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(
    family: str = "llama", *, moved: float = 0.0, lora: dict[str, Any] | None = None, seed: int = 1, **policy: Any
) -> Policy:
    """A tiny policy with adapters of rank 4; `moved`: by how much every B has left its start at zero."""
    made = tiny_policy(family, **policy)
    settings: dict[str, Any] = {"rank": 4, "alpha": 8} | (lora or {})
    add_adapters(made, LoraConfig(**settings), seed=seed)
    generator = torch.Generator().manual_seed(5)
    for layer in adapters_of(made.module).values():
        layer.lora_B.data.add_(moved * torch.randn(layer.lora_B.shape, generator=generator))
    return made


def logits_of(model: Any) -> Tensor:
    ids, positions = torch.arange(9) * 7, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0])
    with torch.inference_mode():
        return model.logits(model.hidden_states(ids, positions, PackedAttention(torch.tensor([0, 5, 8, 9]))))


def trained(policy: Policy) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.weights.items() if weight.requires_grad}


def test_an_adapter_adds_alpha_over_rank_times_b_a():
    base = nn.Linear(2, 1, bias=True)
    base.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])})
    layer = LoraLinear(base, rank=1, scale=2.0)
    layer.lora_A.data.copy_(torch.tensor([[3.0, -1.0]]))
    layer.lora_B.data.copy_(torch.tensor([[4.0]]))
    # [10, 1] -> 10 + 2 + 0.5 = 12.5 of the base, and 2 * 4 * (30 - 1) = 232 of the adapter
    assert_close(layer(torch.tensor([[10.0, 1.0]])), torch.tensor([[244.5]]))
    assert_close(effective_weight(layer), torch.tensor([[1.0 + 24.0, 2.0 - 8.0]]))


def test_every_start_that_the_configuration_knows_is_there():
    assert tuple(STARTS) == LORA_STARTS


def test_the_gradient_of_the_product_is_autograds():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(5, 3).double().requires_grad_(False), rank=2, scale=1.5)
    layer.lora_A.data.normal_()
    layer.lora_B.data.normal_()
    rows = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def product(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return layer(rows)

    assert torch.autograd.gradcheck(product, (rows, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_new_adapters_change_nothing_and_freeze_the_base(family):
    policy = adapted(family)
    assert torch.equal(logits_of(policy), logits_of(tiny_policy(family)))
    assert {name.rpartition(".")[2] for name in trained(policy)} == {"lora_A", "lora_B"}
    assert len(trained(policy)) == 2 * 2 * len(NAMES)
    assert sum(tensor.numel() for tensor in trained(policy).values()) < 0.5 * sum(
        weight.numel() for weight in tiny_policy(family).weights.values()
    )


def test_the_same_seed_gives_the_same_adapters_and_another_seed_others():
    first, again, other = (trained(adapted(seed=seed)) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.down_proj.lora_A"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= 64**-0.5  # kaiming: uniform within 1 / sqrt(inputs)
    assert first["model.layers.1.mlp.down_proj.lora_B"].abs().max() == 0


@pytest.mark.parametrize(
    ("lora", "names"),
    [
        ({}, NAMES),
        ({"target_modules": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"target_modules": "down_proj"}, ["down_proj"]),
        ({"exclude_modules": ["gate_proj", "up_proj", "down_proj"]}, NAMES[:4]),
        ({"target_modules": ["self_attn.q_proj"]}, ["q_proj"]),
    ],
)
def test_the_layers_that_are_named_get_adapters(lora, names):
    layers = adapters_of(adapted(lora=lora).module)
    assert [name.rpartition(".")[2] for name in layers] == names * 2  # in both blocks


def test_one_layer_is_named_by_its_whole_name():
    policy = adapted(lora={"target_modules": "q_proj", "exclude_modules": "model.layers.0.self_attn.q_proj"})
    assert list(adapters_of(policy.module)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("family", "lora", "says"),
    [
        ("llama", {"target_modules": ["qproj"]}, "names 'qproj', but LlamaForCausalLM has no such .* nearest: q_proj"),
        ("llama", {"target_modules": ["c_attn"]}, r"all: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
        ("llama", {"target_modules": ["lm_head"]}, "the output head takes no adapter"),
        ("llama", {"exclude_modules": ["fc"]}, "exclude_modules names 'fc'"),
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "nothing is left to train"),
        ("gpt2", {}, "GPT2LMHeadModel has no linear layers that could get an adapter"),
    ],
)
def test_a_model_without_such_modules_is_refused_with_the_nearest(family, lora, says):
    with pytest.raises(NoSuchModules, match=says):
        adapted(family, lora=lora)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_shared_prefix_does_not_change_logprobs_or_gradient(family, gradient_checkpointing):
    batch = shared_batch()
    pull = pull_on(batch)
    policy = adapted(family, moved=0.05, gradient_checkpointing=gradient_checkpointing)
    logprobs, gradient = logprobs_and_gradient(policy, [batch], pull)
    expected, expected_gradient = logprobs_and_gradient(adapted(family, moved=0.05), one_by_one(batch), pull)
    assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert gradient.keys() == trained(policy).keys()
    assert relative_difference(gradient, expected_gradient) < 1e-5


def test_the_gradient_is_the_whole_weights_projected_on_the_adapters():
    """With W' = W + s B A: dA = s B^T dW', dB = s dW' A^T."""
    batch = shared_batch()
    policy, whole = adapted(moved=0.05), tiny_policy()
    layers = adapters_of(policy.module)
    for name, layer in layers.items():
        whole.weights[f"{name}.weight"].data.copy_(effective_weight(layer))
    _, gradient = logprobs_and_gradient(policy, [batch], pull_on(batch))
    _, of_whole = logprobs_and_gradient(whole, [batch], pull_on(batch))
    expected = {}
    for name, layer in layers.items():
        of_weight, a, b = of_whole[f"{name}.weight"], layer.lora_A.detach().double(), layer.lora_B.detach().double()
        expected |= {f"{name}.lora_A": 2.0 * b.T @ of_weight, f"{name}.lora_B": 2.0 * of_weight @ a.T}
    assert relative_difference(gradient, expected) < 1e-5


@pytest.mark.parametrize("limits", [{"max_tokens_per_microbatch": n} for n in (30, 100, 8192)])
def test_micro_batches_and_gradient_checkpointing_do_not_change_an_update(limits):
    algorithm = {"kl_loss_coef": 0.1, "use_entropy_loss": True}
    results = []
    cuts: list[tuple[bool, dict[str, Any]]] = [(False, {"micro_train_batch_size_per_gpu": 1}), (True, limits)]
    for checkpointing, trainer in cuts:
        config = trainer_config(algorithm, **trainer, train_batch_size=4, policy_mini_batch_size=4)
        policy = adapted(moved=0.05, gradient_checkpointing=checkpointing)
        learner = learner_for(config, policy=policy, reference=BaseUnderAdapters.of(policy))
        metrics = learner.update(prepared(learner, config, shared_batch()))
        results.append((metrics["policy/grad_norm"], metrics["policy/final_loss"]))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_holds_masters_and_moments_of_the_adapters_alone(dtype):
    config = trainer_config()
    policy = adapted(compute_dtype=dtype)
    base = {name: weight.clone() for name, weight in policy.weights.items() if not weight.requires_grad}
    learner = learner_for(config, policy=policy)
    learner.update(prepared(learner, config))
    parts = learner._optimizer.parts()
    assert parts.keys() == {f"{kind}/{name}" for kind in ("masters", *MOMENTS) for name in trained(policy)}
    assert {part.rows.dtype for part in parts.values()} == {torch.float32}
    assert all(torch.equal(policy.weights[name], weight) for name, weight in base.items())
    assert all(weight.grad is None for name, weight in policy.weights.items() if name in base)


def test_training_pulls_the_policy_towards_what_was_rewarded():
    config = trainer_config(optimizer={"lr": 1e-2})
    learner = learner_for(config, policy=adapted())
    batch = prepared(learner, config)
    better, worse = (batch.loss_mask & (batch.advantages * sign > 0) for sign in (1, -1))
    before = learner._logprobs(learner.policy, batch)
    for _ in range(3):
        learner.update(batch)
    after = learner._logprobs(learner.policy, batch)
    assert (after - before)[better].mean() > 0.01
    assert (after - before)[worse].mean() < -0.01


def test_the_reference_is_the_base_and_holds_no_second_model():
    config = trainer_config({"use_kl_loss": True}, update_epochs_per_batch=2)
    policy = adapted()
    reference = BaseUnderAdapters.of(policy)
    learner = learner_for(config, policy=policy, reference=reference)
    for _ in range(2):
        learner.update(prepared(learner, config))
    batch = learner.add_logprobs(random_batch())
    alone = learner_for(config, policy=tiny_policy(), reference=tiny_policy())
    expected = alone.add_logprobs(random_batch())
    assert reference.module is policy.module
    assert torch.equal(batch.ref_logprobs, expected.ref_logprobs)
    assert (batch.old_logprobs - batch.ref_logprobs).abs().max() > 0.01


def test_the_reference_becomes_the_policy_when_asked_and_stays_while_the_policy_moves_on():
    config = trainer_config({"use_kl_loss": True}, update_epochs_per_batch=2)
    policy = adapted(moved=0.05)
    learner = learner_for(config, policy=policy, reference=BaseUnderAdapters.of(policy))
    learner.update_reference()
    batch = learner.add_logprobs(random_batch())
    assert torch.equal(batch.ref_logprobs, batch.old_logprobs)
    learner.update(prepared(learner, config))
    later = learner.add_logprobs(random_batch())
    assert torch.equal(later.ref_logprobs, batch.ref_logprobs)
    assert (later.old_logprobs - later.ref_logprobs).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_learner_continues_bit_for_bit(dtype, tmp_path):
    config = trainer_config(
        {"kl_loss_coef": 0.1}, {"scheduler": "linear", "num_warmup_steps": 1}, policy_mini_batch_size=1,
        update_ref_every_epoch=True,
    )  # fmt: skip

    def new(seed: int) -> tuple[TorchLearner, BaseUnderAdapters]:
        policy = adapted(compute_dtype=dtype, seed=seed)
        reference = BaseUnderAdapters.of(policy)
        return learner_for(config, policy=policy, reference=reference), reference

    def train(learner: TorchLearner, seeds: list[int]) -> None:
        for seed in seeds:
            learner.update(prepared(learner, config, random_batch(seed=seed)))
            learner.update_reference()

    unbroken, their_reference = new(seed=1)
    train(unbroken, [0])
    unbroken.save(tmp_path).result()
    train(unbroken, [1, 2])
    resumed, our_reference = new(seed=7)
    resumed.load(tmp_path)
    train(resumed, [1, 2])
    assert resumed.policy_version == unbroken.policy_version == 9
    for theirs, ours in zip(trained(unbroken.policy).values(), trained(resumed.policy).values(), strict=True):
        assert torch.equal(ours, theirs)
    for name, weight in their_reference.weights.items():
        assert torch.equal(our_reference.weights[name], weight)
