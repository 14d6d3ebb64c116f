"""The memory that the plan predicts for an update is the memory that the GPU allocates."""

from __future__ import annotations

import pytest
import torch

from skyrl_train import compute
from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.config import AlgorithmConfig, LoraConfig, TrainerConfig
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.ops import cuda
from skyrl_train.policy import memory_plan
from skyrl_train.policy.memory_plan import GIB, Demands
from skyrl_train.policy.model import wrap_module
from skyrl_train.policy.model_memory import gpu, model_memory
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.workers.samples import batch
from tests.skyrl_train.learner.on_meta import meta_module
from tests.tiny_models import tiny_module, tiny_tokenizer

NUM_PROMPTS, SAMPLES, TOKENS = 14, 8, 128
PASS = 7 * (1 + SAMPLES) * TOKENS  # two passes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_the_measured_peak_of_an_update(device: torch.device, checkpointing: bool) -> None:
    here = gpu(device, whole=False)
    has_flash = cuda.has_flash(device, torch.bfloat16, 64)
    model = model_memory(
        meta_module("qwen2.5-0.5b"), LoraConfig(), has_flash=has_flash, is_fused=cuda.has_fused_blocks()
    )
    keys = SAMPLES * 2 / (1 + SAMPLES)
    demands = Demands(2 * TOKENS, keys_per_token=keys, max_sequences=1, prefill_tokens=1)
    states = sum(memory_plan._states(model, demands).values())
    planned = states + sum(memory_plan._pass(model, demands, here, PASS, checkpointing))
    if planned > 0.8 * here.available:
        pytest.skip(f"needs {planned / GIB:.0f} GiB")

    module = tiny_module("qwen2", dtype=torch.bfloat16, **SHAPES["qwen2.5-0.5b"]).to(device)
    policy = wrap_module(module, gradient_checkpointing=checkpointing)
    config = TrainerConfig(
        algorithm=AlgorithmConfig(use_kl_loss=False), train_batch_size=NUM_PROMPTS,
        policy_mini_batch_size=NUM_PROMPTS, max_tokens_per_microbatch=PASS,
    )  # fmt: skip
    sizes = {"num_prompts": NUM_PROMPTS, "samples": SAMPLES, "tokens": TOKENS, "prompt_tokens": TOKENS}
    samples = batch(tiny_tokenizer(), sizes)
    learner = compute.submit(TorchLearner, policy, config, num_training_steps=10).result()

    def update() -> None:
        learner.update(add_advantages(learner.add_logprobs(samples), config.algorithm))

    compute.submit(update).result()  # makes the moments
    torch.cuda.reset_peak_memory_stats(device)
    compute.submit(update).result()
    assert torch.cuda.max_memory_allocated(device) == pytest.approx(planned, rel=0.1)
