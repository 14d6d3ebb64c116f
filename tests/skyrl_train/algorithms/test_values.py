"""The critic's numbers by hand: GAE over a table, the clipped value loss from both sides, explained variance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import add_advantages, gae
from skyrl_train.algorithms.masked import whiten
from skyrl_train.algorithms.values import explained_variance, value_loss
from skyrl_train.batch.packing import pack
from skyrl_train.config import AlgorithmConfig
from tests.skyrl_train.batches import sample

JUNK = 100.0  # values where nothing was sampled


def test_gae_by_the_recursion_over_turns_an_edited_history_and_another_trajectory():
    """gamma 0.5, lambda 0.8, so gamma * lambda = 0.4; values 0.5 and so on.

    trajectory a_0: two turns in one row with an observation of two tokens between them, then a row of its own, as an
    edited history opens one: four sampled tokens are four time steps.
        k   r_k   V_k   d_k = r_k + 0.5 V_{k+1} - V_k        A_k = d_k + 0.4 A_{k+1}      R = A + V
        0   0     0.5   0 + 0.5 * 0.2 - 0.5   = -0.4         -0.4  + 0.4 * 1.24 = 0.096   0.596
        1   1     0.2   1 + 0.5 * 0.4 - 0.2   =  1.0          1.0  + 0.4 * 0.6  = 1.24    1.44
        2   0     0.4   0 + 0.5 * 1.0 - 0.4   =  0.1          0.1  + 0.4 * 1.25 = 0.6     1.0
        3   2.25  1.0   2.25 + 0 - 1.0        =  1.25         1.25                        2.25
    trajectory a_1: one token, r = 0.5, V = 0.3, so A = 0.2.
    """
    batch = pack(
        [
            sample("0110010", [0, 0, 1.0, 0, 0, 0, 0]),
            sample("0001", [0, 0, 0, 2.25]),
            sample("01", [0, 0.5], trajectory="a_1"),
        ]
    )
    values = tensor([JUNK, 0.5, 0.2, JUNK, JUNK, 0.4, JUNK, JUNK, JUNK, JUNK, 1.0, JUNK, 0.3])
    advantages, returns = gae(batch, values, gamma=0.5, lambd=0.8)
    assert_close(returns, tensor([0, 0.596, 1.44, 0, 0, 1.0, 0, 0, 0, 0, 2.25, 0, 0.5]))
    by_hand = tensor([0, 0.096, 1.24, 0, 0, 0.6, 0, 0, 0, 0, 1.25, 0, 0.2])
    assert_close(advantages, whiten(by_hand, batch.loss_mask))


@pytest.mark.parametrize(("lambd", "returns"), [(0.0, [0.7, 1.0]), (1.0, [1.0, 1.0])])
def test_lambda_is_read_from_the_configuration(lambd, returns):
    """With lambda 0 the return is r + V of the next token (0 + 0.7, 1 + 0), with 1 the sum of the rewards."""
    batch = pack([sample("011", [0, 0, 1.0]), sample("01", trajectory="a_1")])
    algorithm = AlgorithmConfig(advantage_estimator="gae", lambd=lambd)
    batch = add_advantages(replace(batch, values=tensor([JUNK, 0.2, 0.7, JUNK, 0.0])), algorithm)
    assert batch.returns is not None
    assert_close(batch.returns, tensor([0, *returns, 0, 0]))


def test_the_value_loss_is_clipped_from_both_sides_and_only_where_the_value_came_nearer():
    old, returns = tensor([0.0, 0.0, 0.0, 0.0, 0.0]), tensor([1.0, -1.0, -1.0, 1.0, 9.0])
    values = tensor([0.5, -0.5, 0.5, 0.1, 9.0]).requires_grad_()
    mask = tensor([True, True, True, True, False])
    loss, metrics = value_loss(values, old, returns, mask, value_clip=0.2)
    # +0.5 towards +1: max(0.5^2, (0.2 - 1)^2) = 0.64;   -0.5 towards -1: the same
    # +0.5 away from -1: max(1.5^2, 1.2^2) = 2.25;       +0.1 towards +1, inside: 0.9^2 = 0.81
    assert_close(loss, tensor([0.32, 0.32, 1.125, 0.405, 0.0]))
    assert metrics == {"values_clipfrac": 0.5}
    loss.sum().backward()
    # no gradient where the clip holds it; V - R elsewhere
    assert values.grad is not None
    assert_close(values.grad, tensor([0.0, 0.0, 1.5, -0.9, 0.0]))


def test_without_a_clip_it_is_half_the_squared_error_and_junk_outside_the_mask_counts_nothing():
    loss, metrics = value_loss(
        tensor([3.0, torch.nan]), torch.zeros(2), tensor([1.0, 0.0]), tensor([True, False]), None
    )
    assert (loss.tolist(), metrics) == ([2.0, 0.0], {})


def test_explained_variance():
    returns, mask = tensor([0.0, 2.0, 4.0, 99.0]), tensor([True, True, True, False])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((4,), 7.0), returns, mask) == 0.0  # a constant explains nothing
    # errors 0, 1, 2: variance 2/3; returns: variance 8/3
    assert explained_variance(tensor([0.0, 1.0, 2.0, -5.0]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(tensor([0.0, 1.0]), tensor([0.3, 0.1 + 0.2]), tensor([True, True])) == 0.0  # equal
