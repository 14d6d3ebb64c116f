"""Advantages with numbers that can be checked by hand."""

from dataclasses import replace

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import (
    add_advantages,
    advantage_metrics,
    discounted_sums,
    distillation,
    gae,
    group_metrics,
    group_relative_advantages,
    grpo,
    leave_one_out_advantages,
    mean_normalized_advantages,
    normalize_advantages,
    reinforce_plus_plus,
    rloo,
    trajectory_scores,
    zero_variance_filter,
)
from skyrl_train.algorithms.masked import whiten
from skyrl_train.batch.packing import pack
from skyrl_train.config import AlgorithmConfig
from skyrl_train.config.algorithm import DistillationConfig
from tests.skyrl_train.batches import sample, scored


def test_dr_grpo_compares_siblings_only():
    advantages = group_relative_advantages(tensor([1.0, 0.0, 5.0, 3.0]), tensor([7, 7, 2, 2]), divide_by_std=False)
    assert_close(advantages, tensor([0.5, -0.5, 1.0, -1.0]))


def test_grpo_divides_by_the_unbiased_std():
    # mean 2, centred -2 -1 0 3, squares 4 + 1 + 0 + 9 = 14, / 3
    advantages = group_relative_advantages(tensor([0.0, 1.0, 2.0, 5.0]), torch.zeros(4), divide_by_std=True)
    assert_close(advantages, tensor([-2.0, -1.0, 0.0, 3.0]) / (14 / 3) ** 0.5)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_group_of_one_has_no_advantage(divide_by_std):
    advantages = group_relative_advantages(tensor([3.0, 1.0]), tensor([0, 1]), divide_by_std=divide_by_std)
    assert advantages.tolist() == [0.0, 0.0]


def test_equal_rewards_have_no_advantage_although_their_std_is_not_zero_in_floats():
    rewards = tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    assert rewards.std() > 0  # 1.7e-17
    assert group_relative_advantages(rewards, torch.zeros(3), divide_by_std=True).tolist() == [0.0, 0.0, 0.0]


def test_rloo_compares_with_the_mean_of_the_others():
    # 3 - (0 + 1) / 2, 0 - (3 + 1) / 2, 1 - (3 + 0) / 2; no siblings: 0
    advantages = leave_one_out_advantages(tensor([3.0, 0.0, 1.0, 9.0]), tensor([0, 0, 0, 1]))
    assert_close(advantages, tensor([2.5, -2.0, -0.5, 0.0]))


def test_maxrl_divides_by_the_mean_so_that_a_rare_success_weighs_more():
    rewards = tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    groups = tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    # 1 of 4: (1 - 1/4) / (1/4) = 3;   3 of 4: (1 - 3/4) / (3/4) = 1/3;   none: nothing to divide by
    expected = tensor([3.0, -1.0, -1.0, -1.0, 1 / 3, 1 / 3, 1 / 3, -1.0, 0.0, 0.0])
    assert_close(mean_normalized_advantages(rewards, groups), expected)
    assert mean_normalized_advantages(tensor([0.5, 0.5, 2.0]), tensor([0, 0, 1])).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"may score below 0; one scored -0\.5"):
        mean_normalized_advantages(tensor([1.0, -0.5]), tensor([0, 0]))


def test_an_edited_history_counts_all_its_rewards_and_gives_all_its_samples_the_same_advantage():
    batch = pack(
        [
            sample("001", [0, 0, 1.0], trajectory="a_0"),
            sample("01011", [0, 0, 0, 0, 2.0], trajectory="a_0"),  # the same episode, longer than its first sample
            sample("01", [0, 1.0], trajectory="a_1"),
        ]
    )
    scores, groups, of_sample = trajectory_scores(batch)
    assert (scores.tolist(), groups.tolist(), of_sample.tolist()) == ([3.0, 1.0], [0, 0], [0, 0, 1])
    advantages, returns = grpo(batch, grpo_norm_by_std=False)
    assert advantages.tolist() == [0, 0, 1, 0, 1, 0, 1, 1, 0, -1]
    assert returns.tolist() == advantages.tolist()
    assert rloo(batch)[0].tolist() == [0, 0, 2, 0, 2, 0, 2, 2, 0, -2]


def test_discounted_sums_stay_in_their_row():
    sums = discounted_sums(tensor([1.0, 2.0, 4.0, 8.0, 16.0]), tensor([0, 0, 3, 3, 3]), 0.5)
    assert sums.tolist() == [2.0, 2.0, 12.0, 16.0, 16.0]  # 1 + 1, 2 | 4 + 4 + 4, 8 + 8, 16


def test_reinforce_plus_plus_discounts_sampled_tokens_and_steps_over_observations():
    batch = pack([sample("010011", [0, 0, 0, 0, 0, 4.0]), sample("011", [0, 0, 2.0], trajectory="a_1")])
    advantages, returns = reinforce_plus_plus(batch, gamma=0.5)
    assert returns.tolist() == [0, 1, 0, 0, 2, 4, 0, 1, 2]
    # the five trained returns 1 2 4 1 2: mean 2, squares 1 + 0 + 4 + 1 + 0 = 6, / 4
    assert_close(advantages, tensor([0, -1, 0, 0, 0, 2, 0, -1, 0]) / 1.5**0.5)


def test_reinforce_plus_plus_hands_the_return_of_a_later_sample_back_to_an_earlier_one():
    batch = pack([sample("01", [0, 1.0]), sample("001", [0, 0, 4.0])])
    assert reinforce_plus_plus(batch, gamma=0.5)[1].tolist() == [0, 3, 0, 0, 4]


def test_gae_by_hand_and_nothing_leaks_over_the_end_or_from_observations():
    junk = 100.0  # values where nothing was sampled
    batch = pack([sample("0101", [0, 0, 0, 1.0]), sample("01", [0, 0.5], trajectory="a_1")])
    values = tensor([junk, 0.4, junk, 0.6, junk, 0.3])
    advantages, returns = gae(batch, values, gamma=1.0, lambd=0.5)
    # d = 0 + 0.6 - 0.4 = 0.2 and 1 + 0 - 0.6 = 0.4;  A = 0.2 + 0.5 * 0.4 = 0.4 and 0.4;   other row: 0.5 - 0.3 = 0.2
    assert_close(returns, tensor([0, 0.8, 0, 1.0, 0, 0.5]))
    assert_close(advantages, whiten(tensor([junk, 0.4, junk, 0.4, junk, 0.2]), batch.loss_mask))


def test_gae_without_a_critic_says_what_to_do():
    with pytest.raises(ValueError, match=r"critic\.model\.path"):
        gae(scored(("a", 1.0)), None, 1.0, 1.0)


def test_whitening_counts_trained_tokens_only():
    white = whiten(tensor([1.0, 3.0, 1000.0]), tensor([True, True, False]))
    assert_close(white, tensor([-1.0, 1.0, 0.0]) / 2**0.5)  # variance (1 + 1) / 1
    assert whiten(tensor([1.0, 3.0]), tensor([True, False])).tolist() == [0.0, 0.0]


def test_batch_normalization_has_masked_mean_zero_and_variance_one():
    normal = normalize_advantages(tensor([1.0, 3.0, 1000.0]), tensor([True, True, False]))
    assert_close(normal, tensor([-1.0, 1.0, 0.0]))


def test_the_zero_variance_filter_sums_token_rewards_and_tolerates_rounding():
    def row(rewards, group, trajectory):
        return sample("011", rewards, group=group, trajectory=trajectory)

    batch = pack(
        [
            row([0, 0.1, 0.2], "same", "0"),  # 0.1 + 0.2 is not quite 0.3
            row([0, 0.0, 0.3], "same", "1"),
            row([0, 0.0, 0.3], "mixed", "2"),
            row([0, 0.0, 0.4], "mixed", "3"),
            row([0, 0.0, 0.3], "alone", "4"),
        ]
    )
    rows = zero_variance_filter(batch).loss_mask.reshape(5, 3)
    assert rows[:2].sum() == 0
    assert rows[2:].tolist() == [[False, True, True]] * 3


def test_metrics_are_means_over_trained_tokens():
    batch = scored(("a", 1.0), ("a", 0.0))
    advantages, _ = grpo(batch, grpo_norm_by_std=False)
    metrics = advantage_metrics(replace(batch, advantages=advantages.float()))
    expected = {"loss/avg_final_rewards": 0.5, "loss/avg_raw_advantages": 0.0, "loss/avg_raw_advantages_abs": 0.5}
    assert metrics == expected | {"loss/num_trained_tokens": 4.0}


def test_a_filter_that_empties_the_batch_shows_in_the_number_of_trained_tokens():
    batch = scored(("a", 1.0), ("a", 1.0), ("b", 0.5), ("b", 0.5))
    filtered = add_advantages(batch, AlgorithmConfig(zero_variance_filter=True))
    assert advantage_metrics(add_advantages(batch, AlgorithmConfig()))["loss/num_trained_tokens"] == 8.0
    assert advantage_metrics(filtered)["loss/num_trained_tokens"] == 0.0


def test_groups_without_any_difference_are_counted_and_so_is_a_trajectory_without_siblings():
    batch = scored(("a", 1.0), ("b", 0.5), ("c", 0.0), ("a", 0.0), ("b", 0.5), ("d", 2.0))
    assert group_metrics(batch) == {"reward/equal_group_share": 0.75}  # b, c and d of four
    assert group_metrics(scored(("a", 1.0), ("a", 0.0))) == {"reward/equal_group_share": 0.0}


def half_the_reward(rewards, loss_mask, sample_index, config, **others):
    assert set(others) == {
        "batch", "group_index", "values", "named_rewards", "trajectory_index", "grpo_norm_by_std", "gamma", "lambd",
    }  # fmt: skip
    return rewards * config.gamma / 2 + 7, rewards


def a_row_each(rewards):
    return rewards.reshape(-1, 3), rewards


def test_the_estimator_is_taken_from_the_configuration():
    batch = scored(("a", 1.0), ("a", 0.0))
    by_std = add_advantages(batch, AlgorithmConfig())
    assert_close(by_std.advantages, tensor([0, 1, 1, 0, -1, -1]) * 0.5**0.5)  # 0.5 / (unbiased std 0.7071)
    centred = add_advantages(batch, AlgorithmConfig(grpo_norm_by_std=False))
    assert_close(centred.advantages, tensor([0, 0.5, 0.5, 0, -0.5, -0.5]))
    assert_close(centred.returns, centred.advantages)
    normal = add_advantages(batch, AlgorithmConfig(grpo_norm_by_std=False, advantage_batch_normalize=True))
    assert_close(normal.advantages, tensor([0.0, 1, 1, 0, -1, -1]))


def test_a_custom_estimator_comes_in_by_import_path_and_its_junk_is_masked():
    config = AlgorithmConfig(advantage_estimator=f"{__name__}:half_the_reward", gamma=0.5)
    assert_close(add_advantages(scored(("a", 4.0)), config).advantages, tensor([0.0, 7, 8]))


def test_a_custom_estimator_with_another_shape_is_refused():
    with pytest.raises(
        ValueError,
        match=r"returned \(a tensor \[1, 3\], a tensor \[3\]\); it must return \(advantages, returns\), both \[3\]",
    ):
        add_advantages(scored(("a", 4.0)), AlgorithmConfig(advantage_estimator=f"{__name__}:a_row_each"))


def test_kl_in_the_reward_counts_after_the_zero_variance_filter_and_before_the_estimator():
    batch = scored(("same", 1.0), ("same", 1.0), ("mixed", 1.0), ("mixed", 0.0))
    kl = tensor([0.0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 1, 1])  # of the second and of the last trajectory
    batch = replace(batch, old_logprobs=kl - 1, ref_logprobs=-torch.ones(12))
    config = AlgorithmConfig(
        zero_variance_filter=True, grpo_norm_by_std=False, kl_estimator_type="k1", use_kl_loss=False
    )
    advantages = add_advantages(batch, config, kl_coefficient=0.5).advantages
    # mixed: scores 1 and 0 - 0.5 * 2 = -1
    assert_close(advantages, tensor([0, 0, 0, 0, 0, 0, 0, 1.0, 1, 0, -1, -1]))


def test_distillation_pays_each_token_what_the_teacher_finds_it_likelier():
    """Two trajectories of one prompt token and two sampled ones; scores 1 and 0, so GRPO's advantages are +-0.707."""
    batch = scored(("a", 1.0), ("a", 0.0))
    junk = 9.0
    ours, teachers = tensor([junk, -1.0, -2.0, junk, -0.5, -3.0]), tensor([-junk, -0.25, -2.5, junk, -0.5, -1.0])
    batch = replace(batch, old_logprobs=ours, ref_logprobs=teachers)
    config = AlgorithmConfig(advantage_estimator="distillation", use_kl_loss=False)
    added = add_advantages(batch, config)
    assert added.advantages is not None
    assert_close(added.advantages, tensor([0, 0.75, -0.5, 0, 0.0, 2.0]))
    # the gaps are -0.75, 0.5, 0 and -2: their mean is -0.5625
    assert advantage_metrics(added, distills=True)["loss/reverse_kl"] == pytest.approx(-0.5625)
    assert "loss/reverse_kl" not in advantage_metrics(added)
    mixed = replace(config, distillation=DistillationConfig(reward_weight=2.0))
    half = 0.5 / (0.5**0.5 + 1e-6)  # centred +-0.5, unbiased std 0.707
    expected = tensor([0, 0.75 + 2 * half, -0.5 + 2 * half, 0, -2 * half, 2.0 - 2 * half])
    assert_close(distillation(batch, mixed)[0].float(), expected)
    with pytest.raises(ValueError, match="call add_logprobs first"):
        distillation(replace(batch, old_logprobs=None), config)
