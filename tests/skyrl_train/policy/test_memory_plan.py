from __future__ import annotations

import re
from dataclasses import replace

import pytest

from skyrl_train.config import GeneratorConfig, TrainerConfig
from skyrl_train.policy.memory_plan import GIB, Demands, Device, DoesNotFit, ModelMemory, memory_plan

# What model_memory.py finds for Qwen2.5 in bfloat16, fused blocks and flash attention, full fine-tuning.
HALF_B = ModelMemory(
    num_weights=494_032_768, num_trained=494_032_768, head_weights=136_134_656, num_layers=24, hidden_size=896,
    vocab_size=151_936, itemsize=2, layer_bytes=27_200, layer_kv_bytes=512, has_flash=True, linear_sides=682_000,
)  # fmt: skip
SEVEN_B = ModelMemory(
    num_weights=7_615_616_512, num_trained=7_615_616_512, head_weights=544_997_376, num_layers=28, hidden_size=3584,
    vocab_size=152_064, itemsize=2, layer_bytes=106_616, layer_kv_bytes=2048, has_flash=True, linear_sides=2_523_136,
    linear_weights=6_525_288_448, widest_linear=67_895_296,
)  # fmt: skip
DEMANDS = Demands(longest_sample=1536, keys_per_token=5, max_sequences=1024, prefill_tokens=8192)


def gpu(gib: float) -> Device:
    return Device("a GPU", int(gib * GIB), int((gib - 0.5) * GIB), int(gib * GIB / 32))


@pytest.mark.parametrize(
    ("model", "gib", "token_budget", "checkpointing"),
    [
        (HALF_B, 139.8, 32_768, False),
        (HALF_B, 79.6, 32_768, False),
        (HALF_B, 47.5, 32_768, False),
        (HALF_B, 23.6, 32_768, True),  # a pass costs the host 0.1 s: computing twice is cheaper than many passes
        (SEVEN_B, 191.5, 4096, False),
        (SEVEN_B.with_adapters(16), 79.6, 12_288, False),
        (SEVEN_B.with_adapters(16), 23.6, 12_288, True),
        (replace(SEVEN_B.with_adapters(16), is_four_bit=True), 23.6, 3072, False),
        (replace(SEVEN_B.with_adapters(16), is_four_bit=True), 15.6, 12_288, True),
    ],
)
def test_the_fastest_plan_that_fits(model, gib, token_budget, checkpointing):
    device = gpu(gib)
    plan = memory_plan(model, DEMANDS, device)
    assert (plan.token_budget, plan.gradient_checkpointing) == (token_budget, checkpointing)
    assert sum(plan.parts.values()) <= device.available
    assert plan.kv_cache_bytes >= 16 * DEMANDS.longest_sample * model.kv_bytes  # sixteen replies at once
    assert plan.parts["cache"] == plan.kv_cache_bytes


def test_full_fine_tuning_of_7b_is_refused_on_80_gb_with_what_fits():
    with pytest.raises(DoesNotFit) as refused:
        memory_plan(SEVEN_B, DEMANDS, gpu(79.6))
    line = str(refused.value)
    assert "\n" not in line
    # 7.616e9 weights: 2 bytes of bfloat16, 4 of the master, 8 of the moments, 4 of the gradient
    assert "127.7 GiB (weights 14.2, masters 28.4, moments 56.7, gradient 28.4)" in line
    assert "79.1 of 79.6 GiB are available" in line
    assert "trainer.policy.model.lora.rank=16 (passes of 12,288 tokens)" in line
    assert "checkpointing" not in line  # it was not the user's, so there is nothing to change


def test_adapters_on_7b_are_refused_on_16_gb_with_weights_in_four_bits_as_what_fits():
    with pytest.raises(DoesNotFit) as refused:
        memory_plan(SEVEN_B.with_adapters(16), DEMANDS, gpu(15.6))
    line = str(refused.value)
    assert "weights 14.3" in line
    assert "What fits: adapters on weights of 4 bits, trainer.policy.model.load_in_4bit=true (passes of 12,288" in line
    plan = memory_plan(replace(SEVEN_B.with_adapters(16), is_four_bit=True), DEMANDS, gpu(15.6))
    # 6.525e9 weights in 4.13 bits, 1.131e9 of embedding, head, norms, biases and adapters in 16
    assert plan.parts["weights"] / GIB == pytest.approx(6.525e9 * 4.127 / 8 / GIB + 1.131e9 * 2 / GIB, rel=1e-3)


def test_full_fine_tuning_that_fits_with_moments_of_8_bits_is_told_so():
    with pytest.raises(DoesNotFit) as refused:
        memory_plan(SEVEN_B, DEMANDS, gpu(110))
    assert "trainer.policy.optimizer_config.optim=adamw_8bit (passes of" in str(refused.value)
    eight = memory_plan(replace(SEVEN_B, optim="adamw_8bit"), DEMANDS, gpu(110)).parts["moments"]
    assert eight / (8 * 7_615_616_512) == pytest.approx(0.254, abs=0.001)


def test_an_engine_that_sleeps_during_updates_has_its_share_while_it_samples():
    adapted, device = SEVEN_B.with_adapters(16), gpu(79.6)
    plan = memory_plan(adapted, replace(DEMANDS, engine_bytes=int(0.5 * device.total)), device)
    assert (plan.kv_cache_bytes, plan.session_cache_bytes) == (0, 0)
    assert "vLLM, which sleeps during updates, has 39.8 GiB while it samples" in plan.line(device)
    held = plan.parts["weights"] + plan.parts["masters"] + plan.parts["moments"]
    assert held + 0.5 * device.total <= device.available
    # asleep it holds 2 GiB, so a pass may be larger than beside a cache of our own
    assert plan.token_budget > memory_plan(adapted, DEMANDS, device).token_budget
    assert sum(plan.parts.values()) + 2 * GIB <= device.available
    with pytest.raises(DoesNotFit, match=r"less for vLLM, generator\.gpu_memory_utilization=0\.7"):
        memory_plan(adapted, replace(DEMANDS, engine_bytes=int(0.8 * device.total)), device)


def test_an_engine_on_other_gpus_takes_nothing_of_the_learners():
    plan = memory_plan(HALF_B, replace(DEMANDS, engine_bytes=0), gpu(23.6))
    assert (plan.kv_cache_bytes, plan.parts["cache"]) == (0, 0)
    assert not plan.gradient_checkpointing  # which it needs beside a cache of its own
    assert memory_plan(HALF_B, DEMANDS, gpu(23.6)).gradient_checkpointing


def test_the_gpu_that_is_proposed_is_large_enough_and_not_by_much():
    with pytest.raises(DoesNotFit) as refused:
        memory_plan(SEVEN_B, DEMANDS, gpu(79.6))
    [size] = re.findall(r"a GPU of ([0-9.]+) GiB", str(refused.value))
    assert 127.7 < float(size) < 145
    proposed = replace(gpu(float(size)), available=int(float(size) * GIB))
    memory_plan(SEVEN_B, DEMANDS, proposed)
    with pytest.raises(DoesNotFit):
        memory_plan(SEVEN_B, DEMANDS, replace(proposed, available=proposed.available - 2 * GIB))


@pytest.mark.parametrize(
    ("asked", "proposals"),
    [
        ({"token_budget": 200_000}, ["trainer.max_tokens_per_microbatch=null (passes of"]),
        ({"gradient_checkpointing": False, "longest_sample": 24_576}, ["trainer.gradient_checkpointing=null (passes"]),
        (
            {"gradient_checkpointing": False, "token_budget": 65_536},
            ["trainer.gradient_checkpointing=null", "trainer.max_tokens_per_microbatch=null"],
        ),
        ({"longest_sample": 1_000_000}, ["samples of", "generator.sampling_params.max_generate_length"]),
        ({"reference_weights": 7_000_000_000}, ["trainer.algorithm.use_kl_loss=false", "lora.rank=16"]),
    ],
)
def test_each_single_change_that_fits_is_named(asked, proposals):
    with pytest.raises(DoesNotFit) as refused:
        memory_plan(HALF_B, replace(DEMANDS, **asked), gpu(23.6))
    assert all(proposal in str(refused.value) for proposal in proposals)


def test_what_the_user_sets_stays():
    asked = replace(DEMANDS, token_budget=4096, gradient_checkpointing=True)
    plan = memory_plan(HALF_B, asked, gpu(139.8))
    assert (plan.token_budget, plan.gradient_checkpointing) == (4096, True)


def test_a_pass_holds_at_least_the_longest_sample():
    short, long = (
        memory_plan(HALF_B, replace(DEMANDS, token_budget=512, longest_sample=length), gpu(79.6)).parts["activations"]
        for length in (512, 8192)
    )
    assert long == 16 * short


def test_no_more_cache_than_all_sequences_at_their_longest():
    plan = memory_plan(HALF_B, replace(DEMANDS, max_sequences=8), gpu(139.8))
    assert plan.kv_cache_bytes == 8 * 1536 * 24 * 512


def test_the_cache_comes_from_what_is_left():
    device = gpu(79.6)
    less = replace(device, available=device.available - 30 * GIB)
    plans = [memory_plan(HALF_B, DEMANDS, place) for place in (device, less)]
    assert plans[1].kv_cache_bytes < device.total // 4
    assert sum(plans[1].parts.values()) <= less.available


def test_float32_weights_are_their_own_masters():
    plan = memory_plan(replace(HALF_B, itemsize=4), DEMANDS, gpu(79.6))
    assert plan.parts["masters"] == 0
    assert plan.parts["weights"] == 4 * HALF_B.num_weights


def test_masks_are_counted_where_there_is_no_flash_attention():
    asked = replace(DEMANDS, token_budget=8192, gradient_checkpointing=False)
    flash, masked = (memory_plan(replace(HALF_B, has_flash=is_on), asked, gpu(79.6)) for is_on in (True, False))
    repeated = 4 * 512  # keys of a prefix for each of five samples: four times more
    assert masked.parts["activations"] - flash.parts["activations"] == 24 * 8192 * (1536 * 2 - repeated)


def test_the_line_names_everything():
    line = memory_plan(HALF_B, DEMANDS, gpu(79.6)).line(gpu(79.6))
    assert "\n" not in line
    for part in ("weights 0.9", "masters 1.8", "moments 3.7", "gradient 1.8", "activations", "logits", "cache"):
        assert part in line
    assert "passes of 32,768 tokens without gradient checkpointing" in line


def test_demands_are_read_from_the_configuration():
    trainer = TrainerConfig(train_batch_size=4, policy_mini_batch_size=4, max_prompt_length=100, eval_interval=-1)
    generator = GeneratorConfig(max_input_length=700, n_samples_per_prompt=8)
    generator.sampling_params.max_generate_length = 50
    demands = Demands.of(trainer, generator, 4096, 0)
    assert (demands.longest_sample, demands.max_sequences, demands.keys_per_token) == (750, 32, 8)
    assert Demands.of(trainer, generator, 512, 0).longest_sample == 512
    trainer.eval_interval = 5
    assert Demands.of(trainer, generator, 512, 0).max_sequences == 1024


def test_a_critic_is_held_with_its_optimizer_and_has_no_head():
    trunk = HALF_B.as_critic(is_tied=True)
    alone, both = (
        memory_plan(HALF_B, DEMANDS, gpu(79.6)),
        memory_plan(HALF_B, replace(DEMANDS, critic=trunk), gpu(79.6)),
    )
    assert both.parts["critic"] == (2 + 4 + 8 + 4) * 494_032_768
    assert alone.parts["critic"] == 0
    assert HALF_B.as_critic(is_tied=False).num_trained == 494_032_768 - 136_134_656
    large = replace(DEMANDS, critic=SEVEN_B.as_critic(is_tied=False))
    with pytest.raises(DoesNotFit, match=r"critic \d+\.\d"):
        memory_plan(HALF_B, large, gpu(79.6))


def test_a_pass_of_a_larger_critic_sets_the_activations():
    critic = replace(HALF_B.as_critic(is_tied=True), layer_bytes=10 * HALF_B.layer_bytes)
    demands = replace(DEMANDS, token_budget=2048, gradient_checkpointing=False)
    alone, both = (
        memory_plan(HALF_B, demands, gpu(79.6)),
        memory_plan(HALF_B, replace(demands, critic=critic), gpu(79.6)),
    )
    assert both.parts["activations"] > 8 * alone.parts["activations"]
