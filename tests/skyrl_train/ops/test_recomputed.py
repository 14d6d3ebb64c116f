"""What is made again in backward: the same gradient to the last bit, from less memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skyrl_train.config import LoraConfig
from skyrl_train.ops.recomputed import recomputed
from skyrl_train.ops.reference import Reference
from skyrl_train.policy import blocks
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.lora import add_adapters
from tests.tiny_models import tiny_policy


class Recomputing(Reference):
    recomputes = True

    def __init__(self) -> None:
        self.num_gates = 0

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        self.num_gates += 1
        return super().gate(gate, up)


def gradients(monkeypatch: pytest.MonkeyPatch, family: str, ops: Reference, *, rank: int, checkpointing: bool) -> list:
    policy = tiny_policy(family, num_hidden_layers=2)
    monkeypatch.setattr(blocks, "ops_for", lambda device, dtype: ops)
    if checkpointing:
        policy.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = replace(policy, gradient_checkpointing=True)
    if rank:
        add_adapters(policy, LoraConfig(rank=rank), seed=0)
    ids, device = torch.arange(30) * 7 % 258, torch.device("cpu")
    hidden = policy.hidden_states(ids, torch.arange(30), PackedAttention(torch.tensor([0, 30]), None, device))
    (hidden * torch.linspace(-1, 1, hidden.shape[1])).sum().backward()
    return [weight.grad for weight in policy.module.parameters() if weight.grad is not None]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_gradient_is_the_same_to_the_last_bit(monkeypatch, family, rank):
    kept = gradients(monkeypatch, family, Reference(), rank=rank, checkpointing=False)
    again = gradients(monkeypatch, family, ops := Recomputing(), rank=rank, checkpointing=False)
    assert ops.num_gates == 4  # each of two layers, forward and once more in backward
    assert len(kept) > 8
    assert all(map(torch.equal, kept, again))


def test_with_checkpointing_a_block_is_computed_again_as_a_whole_and_nothing_twice(monkeypatch):
    kept = gradients(monkeypatch, "qwen2", Reference(), rank=0, checkpointing=False)
    again = gradients(monkeypatch, "qwen2", ops := Recomputing(), rank=0, checkpointing=True)
    assert ops.num_gates == 4
    assert all(map(torch.equal, kept, again))


def test_the_tensor_is_freed_and_made_once_for_all_that_need_it():
    x, weights = torch.randn(5, 8, requires_grad=True), [torch.randn(3, 8, requires_grad=True) for _ in range(3)]
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return x.sin()

    tensor = x.sin()
    memory = weakref.ref(tensor.untyped_storage())
    with recomputed(tensor, make):
        out = torch.stack([F.linear(tensor, weight).square().sum() for weight in weights]).sum()
    kept = x.sin()
    total = torch.stack([F.linear(kept, weight).square().sum() for weight in weights]).sum()
    expected = torch.autograd.grad(total, [x, *weights])
    del tensor
    assert memory() is None
    assert all(map(torch.equal, torch.autograd.grad(out, [x, *weights], retain_graph=True), expected))
    assert len(made) == 1
    assert all(map(torch.equal, torch.autograd.grad(out, [x, *weights]), expected))  # a second time, too


def test_another_tensor_of_the_same_memory_is_kept_as_it_is():
    x = torch.randn(4, 6, requires_grad=True)
    tensor = x * 2
    with recomputed(tensor, lambda: pytest.fail("nobody saved it")):
        out = tensor[:, :3].square().sum() + tensor.t().square().sum()
    assert torch.equal(torch.autograd.grad(out, x)[0], 8 * x.detach() * torch.tensor([2.0] * 3 + [1.0] * 3))
