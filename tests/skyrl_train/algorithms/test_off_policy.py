"""Correction for off-policy samples: two rows with ratios old / rollout 2, 2 | 0.5, and an untrained token."""

import pytest
import torch
from torch import tensor, zeros
from torch.testing import assert_close

from skyrl_train.algorithms.off_policy import importance_weights, outlier_mask, ratio_metrics, sequence_mask, token_mask

OLD = tensor([9.0, 2.0, 2.0, 0.5]).log()
MASK = tensor([False, True, True, True])
ROWS = tensor([0, 0, 0, 1])
DATA = (OLD, zeros(4), MASK, ROWS)


def test_token_weights_are_capped_ratios():
    weights, metrics = importance_weights(*DATA, level="token", cap=1.5)
    assert_close(weights[MASK], tensor([1.5, 1.5, 0.5]))
    assert metrics == {"tis_token_clip_high_ratio": pytest.approx(2 / 3)}


def test_sequence_weights_multiply_over_the_trained_tokens():
    weights, metrics = importance_weights(*DATA, level="sequence", cap=3.0)
    assert_close(weights[MASK], tensor([3.0, 3.0, 0.5]))  # 2 * 2 = 4 -> 3
    assert metrics == {"tis_seq_clip_high_ratio": 0.5}


@pytest.mark.parametrize("cap", [0.0, -1.0])
def test_a_cap_that_would_flip_the_sign_of_the_loss_is_refused(cap):
    with pytest.raises(ValueError, match="positive"):
        importance_weights(*DATA, level="token", cap=cap)


def test_one_outlier_token_drops_its_row():
    mask, metrics = outlier_mask(*DATA, low=0.6, high=None)
    assert mask.tolist() == [False, True, True, False]
    assert metrics["outlier_seq_masked_ratio"] == metrics["outlier_seq_under_low_ratio"] == 0.5
    mask, metrics = outlier_mask(*DATA, low=None, high=1.9)
    assert mask.tolist() == [False, False, False, True]
    assert metrics["outlier_seq_over_high_ratio"] == 0.5


def test_the_sequence_mask_looks_at_the_product_or_at_the_geometric_mean():
    product, metrics = sequence_mask(*DATA, metric="product", low=0.4, high=3.0)  # 4 | 0.5
    assert product.tolist() == [False, False, False, True]
    assert metrics["product_sequence_mask_over_high_ratio"] == 0.5
    geometric, metrics = sequence_mask(*DATA, metric="geometric", low=0.6, high=3.0)  # 2 | 0.5
    assert geometric.tolist() == [False, True, True, False]
    assert metrics["geo_sequence_mask_under_low_ratio"] == metrics["geo_sequence_mask_masked_ratio"] == 0.5


def test_ratio_metrics_see_trained_tokens_only():
    metrics = ratio_metrics(OLD, zeros(4), MASK)
    expected = {"is_ratio_mean": 1.5, "is_ratio_std": 0.5**0.5, "is_ratio_max": 2.0, "is_ratio_min": 0.5}
    assert metrics == pytest.approx(expected)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="tis_ratio_type"):
        importance_weights(*DATA, level="row", cap=1.0)
    with pytest.raises(ValueError, match="sequence_mask_metric"):
        sequence_mask(*DATA, metric="sum", low=0.0, high=1.0)


def test_single_tokens_outside_the_bounds_are_dropped():
    ratios, mask = tensor([0.4, 1.0, 6.0, 0.4]), tensor([True, True, True, False])
    arguments = (ratios.log(), torch.zeros(4), mask)
    kept, metrics = token_mask(*arguments, low=0.5, high=5.0)
    assert kept.tolist() == [False, True, False, False]
    assert metrics == pytest.approx(
        {"token_mask_ratio": 2 / 3, "token_mask_over_high_ratio": 1 / 3, "token_mask_under_low_ratio": 1 / 3}
    )
    assert token_mask(*arguments, low=None, high=5.0)[0].tolist() == [True, True, False, False]
    kept, metrics = token_mask(*arguments, low=None, high=None)
    assert kept is mask
    assert metrics == {}
