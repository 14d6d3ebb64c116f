"""OPO, GPG and Pass@k against numbers by hand."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.algorithms.baselines import best_of_group_advantages, length_weighted_advantages
from skyrl_train.algorithms.trial_batch import trial_batch
from skyrl_train.config import AlgorithmConfig

SCORES, GROUPS = tensor([1.0, 0.0, 0.5, 5.0, 5.0, 3.0]), tensor([0, 0, 0, 1, 1, 2])


def test_opo_weighs_the_baseline_by_length():
    # group 0: (1 * 1 + 0 * 2 + 0.5 * 5) / 8 = 0.4375; group 1 is equal, group 2 has one
    found = length_weighted_advantages(SCORES, GROUPS, tensor([1.0, 2.0, 5.0, 3.0, 4.0, 9.0]))
    assert_close(found, tensor([0.5625, -0.4375, 0.0625, 0.0, 0.0, 0.0]))


def test_pass_at_k_pays_the_best_its_lead_over_the_second():
    assert best_of_group_advantages(SCORES, GROUPS).tolist() == [0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert best_of_group_advantages(tensor([2.0, 2.0, 1.0]), tensor([0, 0, 0])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # scores 1, 0 and 0.5, 1, or equal ones in the second group; trained tokens 4, 3, 4, 2
        ("opo", [1 - 4 / 7, -4 / 7, 0.5 - 4 / 6, 1 - 4 / 6]),
        ("pass_at_k", [1.0, 0.0, 0.0, 0.5]),
        ("gpg", [0.5, -0.5, -0.25, 0.25]),
    ],
)
def test_each_is_on_every_trained_token(estimator, expected):
    batch = add_advantages(trial_batch(), AlgorithmConfig(advantage_estimator=estimator))
    assert batch.advantages is not None
    assert_close(batch.advantages, torch.where(batch.loss_mask, tensor(expected)[batch.sample_index], 0.0))


def test_gpg_counts_only_groups_that_differ():
    batch = trial_batch()
    batch.rewards[batch.offsets[3:] - 1] = 1.0  # the second group scores 1, 1: alpha = 2 groups / 1
    found = add_advantages(batch, AlgorithmConfig(advantage_estimator="gpg")).advantages
    assert found is not None
    assert [float(found[batch.sample_index == i][-1]) for i in range(4)] == [1.0, -1.0, 0.0, 0.0]
