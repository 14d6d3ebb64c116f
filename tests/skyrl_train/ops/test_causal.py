"""Attention behind a shared prefix: its own backward is that of a plain softmax, however it is cut into blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from skyrl_train.ops import causal
from skyrl_train.ops.causal import causal_attention

SCALE = 0.3


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], window: int | None
) -> Tensor:
    """One sample and one head at a time, with every score of it: [S, L, heads, D]."""
    size, heads = query.shape[1:3]
    first = len(prefix[0])
    distance = torch.arange(first, first + size)[:, None] - torch.arange(first + size)
    is_hidden = (distance < 0) | (distance >= (window or first + size))
    out = torch.empty_like(query)
    for sample in range(len(query)):
        for head in range(heads):
            group = head * key.shape[2] // heads
            keys, values = (torch.cat([p, t[sample]])[:, group] for p, t in zip(prefix, (key, value), strict=True))
            scores = (query[sample, :, head] @ keys.T * SCALE).masked_fill(is_hidden, -torch.inf)
            out[sample, :, head] = scores.softmax(-1) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 8, 25])
@pytest.mark.parametrize("prefix_tokens", [0, 13])
@pytest.mark.parametrize("queries_at_once", [1, 7, 256])
def test_values_and_gradients_are_those_of_a_plain_softmax(window, prefix_tokens, queries_at_once, monkeypatch):
    monkeypatch.setattr(causal, "QUERIES_AT_ONCE", queries_at_once)
    monkeypatch.setattr(causal, "SCORES_AT_ONCE", 1000)  # a few entries at a time
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key, value, pull = numbers(3, 20, 4, 8), numbers(3, 20, 2, 8), numbers(3, 20, 2, 8), numbers(3, 20, 4, 8)
    prefix = numbers(prefix_tokens, 2, 8), numbers(prefix_tokens, 2, 8)
    inputs = [query, key, value, *prefix]
    cut = prefix_tokens // 2  # the prefix is a chain of two segments
    before = [part for tensor in prefix for part in tensor.split([cut, prefix_tokens - cut])]
    ours = causal_attention(query, key, value, before, scale=SCALE, window=window)
    expected = plain_attention(query, key, value, prefix, window)
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(expected, inputs, pull), strict=True)
    for gradient, expected_gradient in pairs:
        assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
