"""An episode of several turns under every estimator: its group compares episodes, whatever rows its turns became."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import add_advantages, group_metrics
from skyrl_train.algorithms.kl import kl_metrics
from skyrl_train.algorithms.multi_reward import NamedRewards
from skyrl_train.algorithms.registry import AdvantageEstimatorRegistry
from skyrl_train.algorithms.skyrl_style import is_ours
from skyrl_train.batch.packing import pack, with_loss_weights
from skyrl_train.batch.steps import merged
from skyrl_train.config import AlgorithmConfig
from skyrl_train.config.algorithm import DistillationConfig
from skyrl_train.types import Batch
from tests.skyrl_train.batch.test_steps import row

# Episode p_0: turn [5 6] is paid 1, turn [7] is paid 2. Episode p_1: its only turn [8 9] is paid 1.
FIRST = row([1, 2], [5, 6], rewards=[0.0, 1.0])
GOES_ON = row([1, 2, 5, 6, 3], [7], rewards=[2.0])
REWRITTEN = row([1, 2, 6, 3], [7], rewards=[2.0])
OTHER = row([1, 2], [8, 9], rewards=[0.0, 1.0], trajectory="p_1")
ROWS = {
    "joined": [*merged([FIRST, GOES_ON]), OTHER],
    "apart": [FIRST, GOES_ON, OTHER],
    "rewritten": [FIRST, REWRITTEN, OTHER],
}
NAMED = NamedRewards(("near", "short"), tensor([[3.0, 0.0], [1.0, 1.0]]).double(), tensor([1.0, 0.5]).double())
VALUES = {5: 0.5, 6: 1.0, 7: 1.0, 8: 0.5, 9: 0.5}  # of a critic, by token

# The advantages of the tokens 5 6 7 | 8 9.
BY_HAND = {
    # episodes score 3 and 1 (turns would be 1, 2 and 1): mean 2, unbiased std sqrt(2)
    "grpo": [1, 1, 1, -1, -1],
    "rloo": [2, 2, 2, -2, -2],  # 3 - 1 and 1 - 3
    "maxrl": [0.5, 0.5, 0.5, -0.5, -0.5],  # (3 - 2) / 2
    "opo": [0.8, 0.8, 0.8, -1.2, -1.2],  # less (3 tokens x 3 + 2 x 1) / 5 = 2.2
    "pass_at_k": [2, 2, 2, 0, 0],  # the lead of the best episode
    "gpg": [1, 1, 1, -1, -1],
    # gamma 0.5: 2, 1 + 1, 0 + 1 | 1, 0.5; mean 1.3, squares 0.09 + 0.49 + 0.49 + 0.64 + 0.09 = 1.8, / 4
    "reinforce++": [x / 0.45**0.5 for x in (-0.3, 0.7, 0.7, -0.8, -0.3)],
    # gamma 0.5, lambda 1: returns as above less the values: 0.5, 1, 1 | 0, 0.5; mean 0.6,
    # squares 0.01 + 0.16 + 0.16 + 0.36 + 0.01 = 0.7, / 4
    "gae": [x / 0.175**0.5 for x in (-0.1, 0.4, 0.4, -0.6, -0.1)],
    # names "near" 3 and 1, "short" 0 and 1 at weight 0.5: (1 - 0.5) / sqrt(2) and minus that, whose std is 0.5
    "gdpo": [x / 2**0.5 for x in (1, 1, 1, -1, -1)],
    "distillation": [0.5, 0.4, 0.3, -1.8, -1.9],  # -token / 10 of the teacher, and GRPO's
}


def batch_of(rows: str) -> Batch:
    """The policy's logprobs before the update are 0 here, the teacher's minus a tenth of the token."""
    batch = pack(ROWS[rows])
    values = tensor([VALUES.get(token, 50.0) for token in batch.input_ids.tolist()])
    old = values * 0.0
    return Batch(**{**vars(batch), "values": values, "old_logprobs": old, "ref_logprobs": -batch.input_ids / 10})


def by_token(batch: Batch, numbers) -> list[float]:
    found = {
        int(token): float(number)
        for token, number, mask in zip(batch.input_ids, numbers, batch.loss_mask, strict=True)
        if mask
    }
    assert batch.loss_mask.sum() == 5  # each sampled token is trained once
    return [found[token] for token in (5, 6, 7, 8, 9)]


def test_every_estimator_is_in_the_table():
    registered = AdvantageEstimatorRegistry.list_available()
    assert {name for name in registered if is_ours(AdvantageEstimatorRegistry.get(name))} == BY_HAND.keys()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("estimator", BY_HAND)
def test_turn_rewards_by_hand(estimator, rows):
    algorithm = AlgorithmConfig(
        advantage_estimator=estimator,
        grpo_norm_by_std=False,
        gamma=0.5,
        lambd=1.0,
        distillation=DistillationConfig(reward_weight=1.0),
        use_kl_loss=False,
    )
    batch = batch_of(rows)
    advantages = add_advantages(batch, algorithm, named_rewards=NAMED).advantages
    assert_close(tensor(by_token(batch, advantages)), tensor(BY_HAND[estimator], dtype=torch.float32))


@pytest.mark.parametrize("rows", ROWS)
def test_the_std_of_grpo_is_that_of_episodes(rows):
    batch = batch_of(rows)
    advantages = add_advantages(batch, AlgorithmConfig(advantage_estimator="grpo", grpo_norm_by_std=True)).advantages
    assert_close(tensor(by_token(batch, advantages)), tensor([1.0, 1, 1, -1, -1]) / 2**0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", ROWS)
def test_the_return_of_a_later_turn_reaches_back_to_the_critics_targets(rows):
    batch = batch_of(rows)
    returns = add_advantages(batch, AlgorithmConfig(advantage_estimator="gae", gamma=0.5, lambd=1.0)).returns
    assert by_token(batch, returns) == [1.0, 2.0, 2.0, 0.5, 1.0]


@pytest.mark.parametrize("rows", ROWS)
def test_an_estimator_in_skyrls_style_gets_a_row_per_episode(rows):
    def scores(token_level_rewards, response_mask, index, **kwargs):
        summed = token_level_rewards.sum(-1, keepdim=True) * response_mask
        assert (len(token_level_rewards), list(index)) == (2, ["0", "0"])
        return summed, summed

    AdvantageEstimatorRegistry.register("scores", scores)
    try:
        batch = batch_of(rows)
        advantages = add_advantages(batch, AlgorithmConfig(advantage_estimator="scores")).advantages
    finally:
        AdvantageEstimatorRegistry.unregister("scores")
    assert by_token(batch, advantages) == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [1 / 5] * 5),  # over all sampled tokens
        ("sequence_mean", [1 / 6] * 3 + [1 / 4] * 2),  # 2 episodes, of 3 and 2 sampled tokens
        ("seq_mean_token_sum_norm", [1 / 20] * 5),  # 2 episodes, max_seq_len 10
    ],
)
def test_an_episode_counts_once_in_every_loss_reduction(rows, reduction, expected):
    batch = with_loss_weights(batch_of(rows), reduction, max_seq_len=10)
    assert by_token(batch, batch.loss_weights) == pytest.approx(expected)
    assert by_token(batch, batch.kl_weights) == pytest.approx([1 / 6] * 3 + [1 / 4] * 2)
    assert by_token(batch, batch.entropy_weights) == pytest.approx([1 / 5] * 5)


@pytest.mark.parametrize("rows", ROWS)
def test_metrics_count_episodes(rows):
    batch = batch_of(rows)
    assert batch.num_trajectories == 2
    assert group_metrics(batch) == {"reward/equal_group_share": 0.0}
    # k1 is token / 10: (0.5 + 0.6 + 0.7) / 3 and (0.8 + 0.9) / 2
    assert kl_metrics(batch, 0.1, "k1")["loss/avg_kl"] == pytest.approx((0.6 + 0.85) / 2)


@pytest.mark.parametrize("rows", ROWS)
def test_kl_in_the_reward_is_taken_from_each_sampled_token_once(rows):
    batch = batch_of(rows)
    algorithm = AlgorithmConfig(advantage_estimator="rloo", kl_estimator_type="k1")
    advantages = add_advantages(batch, algorithm, kl_coefficient=1.0).advantages
    # scores 3 - 1.8 and 1 - 1.7
    assert by_token(batch, advantages) == pytest.approx([1.9, 1.9, 1.9, -1.9, -1.9])


@pytest.mark.parametrize("rows", ROWS)
def test_the_zero_variance_filter_compares_episodes(rows):
    algorithm = AlgorithmConfig(advantage_estimator="grpo", zero_variance_filter=True)
    batch = batch_of(rows)
    assert add_advantages(batch, algorithm).loss_mask.sum() == 5
    paid_alike = Batch(**{**vars(batch), "rewards": batch.rewards * (batch.input_ids != 7)})  # 1 and 1
    assert add_advantages(paid_alike, algorithm).loss_mask.sum() == 0
