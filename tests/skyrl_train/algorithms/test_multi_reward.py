"""GDPO against numbers by hand, and the named rewards of the trajectories behind a batch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.algorithms.multi_reward import NamedRewards, batch_normalized, named_rewards
from skyrl_train.batch.packing import pack
from skyrl_train.batch.samples import to_samples
from skyrl_train.config import AlgorithmConfig
from skyrl_train.types import EpisodeEnd, Prompt, Trajectory, Turn

WEIGHTS = {"a": 2.0, "b": 1.0}
# two prompts, two episodes of each: what a and b paid
PAID = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 10.0}, {"a": 0.0, "b": 5.0}, {"a": 0.0, "b": 15.0}]


def trajectory(place: int, rewards: dict[str, float], beside: float = 0.0) -> Trajectory:
    total = sum(WEIGHTS.get(name, 1.0) * value for name, value in rewards.items()) + beside
    turns = [
        Turn([1, 2], [3, 4], [-0.1, -0.2], 0.0, "", "stop", 0, rewards=dict.fromkeys(rewards, 0.0)),
        Turn([1, 2, 3, 4, 5], [6] * (1 + place), [-0.3] * (1 + place), total, "", "stop", 0, rewards=rewards),
    ]
    return Trajectory(Prompt(str(place // 2), [], "e"), place % 2, 0, [], turns, EpisodeEnd.FINISHED)


def advantages(played: list[Trajectory], **settings) -> list[float]:
    samples = to_samples(played)
    batch = add_advantages(
        pack(samples),
        AlgorithmConfig(**{"advantage_estimator": "gdpo", **settings}),
        named_rewards=named_rewards(samples, played, WEIGHTS),
    )
    assert batch.advantages is not None
    assert not batch.advantages[~batch.loss_mask].any()
    rows = [batch.advantages[batch.sample_index == i][batch.loss_mask[batch.sample_index == i]] for i in range(4)]
    assert all(bool((row == row[0]).all()) for row in rows)  # one number per trajectory
    return [float(row[0]) for row in rows]


def test_each_reward_is_normalised_in_its_group_then_weighed_then_the_batch_is():
    # a in group 0: +1/sqrt 2, -1/sqrt 2, in group 1: equal, 0; b: -1/sqrt 2, +1/sqrt 2 in both
    # 2 a + b: 0.7071, -0.7071, -0.7071, +0.7071; their unbiased std is sqrt(4 * 0.5 / 3) = 0.8165
    played = [trajectory(i, paid) for i, paid in enumerate(PAID)]
    found = advantages(played)
    assert_close(torch.tensor(found), torch.tensor([0.8660, -0.8660, -0.8660, 0.8660]), atol=1e-4, rtol=0)
    # the sums are 2, 10 and 5, 15: GRPO follows the reward with the wider spread
    assert [value > 0 for value in advantages(played, advantage_estimator="grpo")] == [False, True, False, True]


def test_the_scale_of_a_reward_does_not_matter_and_its_weight_does():
    wide = [trajectory(i, {**paid, "b": 100 * paid["b"]}) for i, paid in enumerate(PAID)]
    assert advantages(wide) == pytest.approx(advantages([trajectory(i, p) for i, p in enumerate(PAID)]), abs=1e-4)


def test_what_was_paid_without_a_name_is_a_reward_of_its_own():
    # group 1 differs in nothing but 3, paid to its second episode by a hook: normalised -0.7071, +0.7071
    played = [trajectory(0, {"a": 1.0}), trajectory(1, {"a": 1.0}), trajectory(2, {"a": 0.0})]
    played.append(trajectory(3, {"a": 0.0}).plus(3.0))
    found = named_rewards(to_samples(played), played, WEIGHTS)
    assert found is not None
    assert found.names == ("a", "unnamed")
    assert found.values.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 3.0]]
    assert found.weights.tolist() == [2.0, 1.0]
    assert advantages(played) == pytest.approx([0.0, 0.0, -1.2247, 1.2247], abs=1e-4)  # 0.7071 / sqrt(1 / 3)


def test_rounding_is_no_reward_and_a_name_that_was_not_paid_is_0():
    played = [trajectory(i, {"a": 0.1, "b": 0.2, "c": 1e6 * i}) for i in range(3)] + [trajectory(3, {"b": 0.2})]
    found = named_rewards(to_samples(played), played, WEIGHTS)
    assert found is not None
    assert found.names == ("a", "b", "c")
    assert found.values[3].tolist() == [0.0, 0.2, 0.0]
    assert named_rewards(to_samples(played), [trajectory(i, {}) for i in range(4)], WEIGHTS) is None


def test_the_rows_are_those_of_the_batch_where_an_episode_gave_no_sample():
    played = [trajectory(i, paid) for i, paid in enumerate(PAID)]
    broken = Trajectory(played[0].prompt, 0, 0, [], [], EpisodeEnd.ENV_FAILURE)
    found = named_rewards(to_samples([broken, *played[1:]]), [broken, *played[1:]], WEIGHTS)
    assert found is not None
    assert found.values[:, 1].tolist() == [10.0, 5.0, 15.0]


def test_equal_sums_give_0_and_not_their_rounding():
    assert not batch_normalized(torch.full((3,), 0.1, dtype=torch.float64)).any()
    assert not batch_normalized(torch.tensor([5.0])).any()


def test_without_names_it_says_what_to_do():
    assert advantages([trajectory(i, {}) for i in range(4)]) == [0.0] * 4  # as where all were cut before any reward
    played = [trajectory(i, {}, beside=1.0) for i in range(4)]
    with pytest.raises(ValueError, match=r"gdpo needs several named rewards.*set environment.rewards, have the env"):
        advantages(played)
    with pytest.raises(ValueError, match="2 names"):
        NamedRewards(("a", "b"), torch.zeros(3, 1), torch.ones(2))
