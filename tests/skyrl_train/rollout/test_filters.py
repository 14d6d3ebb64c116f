"""What the two options for episodes that a length limit ended do to rewards and masks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skyrl_train.batch.samples import to_samples
from skyrl_train.rollout.filters import mask_overlong, zero_reward_on_non_stop
from skyrl_train.types import EpisodeEnd
from tests.skyrl_train.run.records.episodes import trajectory

ENDS = [EpisodeEnd.FINISHED, EpisodeEnd.OUT_OF_TURNS, EpisodeEnd.OUT_OF_TOKENS]


def episode(end: EpisodeEnd, repetition: int = 0):
    return trajectory(["ab", "c"], [0.5, 1.0], end=end, repetition=repetition)


@pytest.mark.parametrize(("end", "reward"), list(zip(ENDS, [1.5, 1.5, 0.0], strict=True)))
def test_only_an_episode_that_a_length_limit_ended_loses_its_reward(end, reward):
    played = episode(end)
    [sample] = to_samples([zero_reward_on_non_stop(played)])
    assert sum(sample.rewards) == zero_reward_on_non_stop(played).reward == reward
    assert any(sample.loss_mask)
    given = replace(played, samples=to_samples([played]))  # as a generator or a hook leaves it
    assert sum(to_samples([zero_reward_on_non_stop(given)])[0].rewards) == reward


def test_only_the_samples_of_overlong_episodes_are_masked_and_their_rewards_stay():
    episodes = [episode(end, repetition) for repetition, end in enumerate(ENDS)]
    before = to_samples(episodes)
    finished, out_of_turns, overlong = mask_overlong(before, episodes)
    assert [finished, out_of_turns] == before[:2]
    assert not any(overlong.loss_mask)
    assert not any(overlong.rollout_logprobs)
    assert overlong.rewards == before[2].rewards
    assert overlong.input_ids == before[2].input_ids
