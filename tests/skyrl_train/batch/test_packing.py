"""Cutting a batch never changes what the loss is."""

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from skyrl_train.batch.packing import micro_batches, mini_batches, pack, with_loss_weights
from tests.skyrl_train.batches import random_batch, sample


def weights(*masks, reduction, max_seq_len=None):
    batch = pack([sample(mask, trajectory=str(i)) for i, mask in enumerate(masks)])
    return with_loss_weights(batch, reduction, max_seq_len).loss_weights


def test_samples_lie_end_to_end_and_are_numbered_by_first_appearance():
    batch = pack([sample("01", group="z", trajectory="z_1"), sample("011", group="b"), sample("01", group="z")])
    assert batch.input_ids.tolist() == [1, 2, 1, 2, 3, 1, 2]
    assert batch.offsets.tolist() == [0, 2, 5, 7]
    assert batch.group_index.tolist() == [0, 1, 0]
    assert batch.trajectory_index.tolist() == [0, 1, 1]


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        pack([])


def test_token_mean_gives_every_token_of_the_mini_batch_the_same_weight():
    assert_close(weights("0111", "01", reduction="token_mean"), tensor([0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4]))


def test_sequence_mean_gives_every_row_with_tokens_the_same_weight():
    # two rows with tokens: 1/2 each, over 3 tokens and over 1; the masked row counts nowhere
    expected = tensor([0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 2, 0, 0])
    assert_close(weights("0111", "01", "00", reduction="sequence_mean"), expected)


def test_seq_mean_token_sum_norm_divides_by_rows_with_tokens_and_a_constant():
    expected = tensor([0, 1 / 20, 1 / 20, 1 / 20, 0, 1 / 20, 0, 0])  # 2 rows * 10
    assert_close(weights("0111", "01", "00", reduction="seq_mean_token_sum_norm", max_seq_len=10), expected)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_kl_and_entropy_weigh_the_same_whatever_the_reduction_of_the_policy_loss_is(reduction):
    batch = pack([sample(mask, trajectory=mask) for mask in ("0111", "01", "00")])
    batch = with_loss_weights(batch, reduction, 75)
    assert_close(batch.kl_weights, tensor([0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 2, 0, 0]))  # each row's mean, then their mean
    assert_close(batch.entropy_weights, tensor([0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4, 0, 0]))


def test_a_batch_without_trained_tokens_weighs_nothing():
    for reduction in ("token_mean", "sequence_mean", "seq_mean_token_sum_norm"):
        assert_close(weights("00", "00", reduction=reduction, max_seq_len=4), torch.zeros(4))


@pytest.mark.parametrize(
    ("reduction", "max_seq_len"), [("mean", None), ("seq_mean_token_sum_norm", None), ("seq_mean_token_sum_norm", 0)]
)
def test_a_reduction_that_cannot_work_is_refused(reduction, max_seq_len):
    with pytest.raises(ValueError, match=r"loss_reduction|max_seq_len"):
        weights("01", reduction=reduction, max_seq_len=max_seq_len)


def test_mini_batches_are_cut_by_prompt_and_the_remainder_is_trained():
    groups = ["x", "y", "x", "z", "y"]
    batch = pack([sample("01", group=group, trajectory=str(i)) for i, group in enumerate(groups)])
    first, second = mini_batches(batch, 2)
    assert first.trajectory_index.tolist() == [0, 1, 2, 4]  # x and y
    assert second.trajectory_index.tolist() == [3]


def test_fewer_prompts_than_a_mini_batch_are_one_mini_batch():
    assert len(mini_batches(pack([sample("01")]), 256)) == 1


def test_micro_batches_are_whole_neighbouring_samples_within_the_limits():
    batch = pack([sample(mask, trajectory=str(i)) for i, mask in enumerate(["011", "01", "01111", "01", "01", "01"])])
    assert [micro.lengths.tolist() for micro in micro_batches(batch, 5)] == [[3, 2], [5], [2, 2], [2]]
    assert [micro.lengths.tolist() for micro in micro_batches(batch, 4)] == [[3], [2], [5], [2, 2], [2]]  # 5 alone
    assert [micro.num_samples for micro in micro_batches(batch, 100, max_samples=4)] == [4, 2]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_micro_batches_joined_again_are_the_mini_batch_with_its_weights(reduction):
    batch = with_loss_weights(random_batch(), reduction, 20)
    parts = micro_batches(batch, 17)
    assert len(parts) > 3
    for name, whole in batch.token_tensors():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
