"""Metrics that arrive in pieces."""

import pytest
import torch

from skyrl_train.batch.packing import pack
from skyrl_train.config import load_config
from skyrl_train.learner.objective import Objective
from skyrl_train.learner.weighted_metrics import WeightedMetrics
from tests.skyrl_train.batches import sample


def test_means_are_weighted_and_extremes_kept():
    metrics = WeightedMetrics.merged(
        WeightedMetrics.of({"loss": 1.0, "ratio_max": 2.0, "ratio_min": 2.0}, 3),
        WeightedMetrics.of({"loss": 5.0, "ratio_max": 1.0, "ratio_min": 1.0}, 1),
        WeightedMetrics.of({"of_nothing": 9.0}, 0),
    )
    assert metrics.means() == {"loss": 2.0, "ratio_max": 2.0, "ratio_min": 1.0}


def test_in_which_portions_pieces_are_merged_changes_no_bit():
    pieces = [
        WeightedMetrics.of({"loss": value}, weight) for value, weight in ((0.1, 3), (0.7, 11), (1e-9, 5), (0.3, 7))
    ]
    first, second, third, fourth = pieces
    left = WeightedMetrics.merged(WeightedMetrics.merged(first, second), WeightedMetrics.merged(third, fourth))
    right = WeightedMetrics.merged(first, WeightedMetrics.merged(second, third, fourth), WeightedMetrics())
    by_hand = (((0.0 + 0.1 * 3) + 0.7 * 11) + 1e-9 * 5) + 0.3 * 7
    assert left == right
    assert left.means()["loss"] == by_hand / 26.0


def test_the_gap_between_engine_and_learner_is_told_for_each_turn():
    batch = pack([sample("0110100"), sample("010")])  # -0.625, -0.75, then -1 in the second turn; -0.625
    learner = torch.tensor([0, -0.725, -0.95, 0, -2.0, 0, 0, 0, -1.025, 0])
    objective = Objective(load_config(["trainer.algorithm.use_kl_loss=false"]).trainer.algorithm)
    first, second = objective.drift_by_turn(batch, learner)
    name = "rollout_train_logprobs_abs_diff_turn"
    assert first == ({f"{name}_1": pytest.approx((0.1 + 0.2 + 0.4) / 3)}, 3)
    assert second == ({f"{name}_2": pytest.approx(1.0)}, 1)
