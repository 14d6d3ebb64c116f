"""Sampling as on a GPU, on the processor: all rows at once give what sampling.py gives row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.engine.torch import sampling
from skyrl_train.engine.torch.batched_sampling import BatchedDraw, cut_weights
from tests.skyrl_train.engine.test_sampling import row

CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000},
    {"top_p": 0.9},
    {"top_p": 0.001, "temperature": 1.7},
    {"top_p": 0.999999},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.05},
    {"repetition_penalty": 1.3, "top_p": 0.8, "temperature": 0.6},
    {"repetition_penalty": 0.7, "banned": (5, 6, 7)},
    {"banned": (0, 999), "top_k": 20},
]


def test_all_rows_at_once_are_cut_as_one_by_one():
    logits = 3 * torch.randn(len(CUTS), 1000, generator=torch.Generator().manual_seed(3))
    rows = [row(seed, position=7, tokens=(*range(20), 3, 500), **cut) for seed, cut in enumerate(CUTS)]
    temperatures = torch.tensor([r.params.temperature or 1.0 for r in rows])[:, None]
    together = cut_weights(logits / temperatures, rows)
    for r, ours, scores in zip(rows, together, logits, strict=True):
        alone = torch.empty_like(scores)
        sampling._cut(alone, scores, r, again=True)
        assert torch.equal(ours > 0, alone > 0), r.params
        assert_close(ours / ours.sum(), alone / alone.sum(), rtol=1e-5, atol=0)


def test_all_rows_at_once_draw_the_same_tokens_as_one_by_one():
    logits = 3 * torch.randn(40 * len(CUTS), 1000, generator=torch.Generator().manual_seed(4))
    rows = [row(seed, tokens=(1, 2, 3), **CUTS[seed % len(CUTS)]) for seed in range(len(logits))]
    together, alone = BatchedDraw(logits, rows).read(), sampling.sample(logits, rows)
    assert together == (alone[0], pytest.approx(alone[1], abs=1e-5))


def test_of_equal_weights_top_k_and_top_p_take_the_same_tokens_whatever_the_other_rows_ask_for():
    equal = torch.zeros(3, 100)
    rows = [row(top_k=2), row(top_k=90), row(top_p=0.05)]
    assert [w.nonzero().flatten().tolist() for w in cut_weights(equal, rows)] == [[0, 1], [*range(90)], [*range(5)]]
