"""Weights in 4 bits and moments in 8 on a GPU: the same numbers as on a CPU, and the memory that the plan counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from skyrl_train.config import LoraConfig
from skyrl_train.policy.lora import add_adapters
from skyrl_train.policy.model import wrap_module
from tests.skyrl_train.engine.conftest import answers, ask
from tests.skyrl_train.learner import test_adamw_8bit as adamw
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config
from tests.tiny_models import tiny_module

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: uv sync --inexact --extra quantized")
from skyrl_train.policy.four_bit import FourBitMatrix, four_bit_matrices, freeze_in_four_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_stands_for_the_same_numbers_as_on_a_cpu(device: torch.device, dtype: torch.dtype) -> None:
    matrix = torch.randn(896, 4864, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = FourBitMatrix(matrix.to(device)).whole().cpu(), FourBitMatrix(matrix).whole()
    assert ours.dtype == theirs.dtype == dtype
    differs = (ours.float() - theirs.float()).abs() > 1e-2 * theirs.float().abs() + 1e-4
    assert differs.float().mean() < 1e-3  # a scale may be rounded the other way


async def test_learner_and_engine_agree_on_adapters_over_four_bits(device: torch.device, make_engine) -> None:
    module = tiny_module("qwen2", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, head_dim=64)
    before = torch.cuda.memory_allocated(device)
    freeze_in_four_bits(module, device)
    resting = sum(matrix.num_bytes for matrix in four_bit_matrices(module).values())
    assert torch.cuda.memory_allocated(device) - before < 1.2 * resting + 2**20
    policy = wrap_module(module.to(device))
    add_adapters(policy, LoraConfig(rank=16), seed=1)
    settings = trainer_config()
    learner, engine = learner_for(settings, policy=policy), make_engine(policy)
    for version in range(1, 4):
        assert learner.update(prepared(learner, settings))["policy/grad_norm"] > 0
        await engine.weights_changed(version)
        [done] = await answers(engine, [ask("ab", temperature=1.0, max_tokens=10)])
        ids = [*ask("ab").prompt_ids, *done.response_ids]
        expected = learner.logprobs_of_tokens(ids)[-len(done.response_ids) :]
        assert_close(torch.tensor(done.logprobs), torch.tensor(expected), rtol=0.05, atol=0.1)


def test_steps_with_moments_of_8_bits_are_those_of_a_cpu(device: torch.device) -> None:
    moved = []
    for place in ("cpu", device):
        weight = nn.Parameter(adamw.start(torch.float32).detach().to(place))
        optimizer = adamw.optimizer_of(weight, "adamw_8bit")
        for step in range(10):
            ((weight * adamw.gradient_of(step, 1.0).to(place)).sum()).backward()
            optimizer.step()
        moved.append(weight.detach().cpu() - adamw.start(torch.float32).detach())
    theirs, ours = moved
    assert (ours - theirs).norm() / theirs.norm() < 0.02
