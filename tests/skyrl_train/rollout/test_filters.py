"""What the two options for episodes that a length limit ended do to rewards and masks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skyrl_train.batch.samples import to_samples
from skyrl_train.rollout.filters import (
    mask_overlong,
    overlong_metrics,
    overlong_penalty,
    with_overlong_penalties,
    zero_reward_on_non_stop,
)
from skyrl_train.types import EpisodeEnd, Group
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


@pytest.mark.parametrize(("num_tokens", "penalty"), [(0, 0.0), (12, 0.0), (13, -0.5), (16, -2.0), (17, -2.0)])
def test_the_length_penalty_is_a_line_over_the_buffer(num_tokens, penalty):
    """A limit of 16 and a buffer of 4: 12 tokens are free, each further one costs 2 / 4."""
    assert overlong_penalty(num_tokens, limit=16, buffer=4, factor=2.0) == penalty


def test_every_turn_pays_for_its_own_reply_and_failures_count_nothing():
    """Replies of 2 and 1 tokens, a limit of 3, a buffer of 2: 2 tokens cost 0.5, 1 is free."""
    played = [episode(EpisodeEnd.FINISHED), episode(EpisodeEnd.FINISHED, 1)]
    played[1] = replace(played[1], samples=to_samples([played[1]]))  # as a generator or a hook leaves it
    sizes = [len(turn.response_ids) for turn in played[0].turns]
    assert sizes == [2, 1]
    broken = replace(episode(EpisodeEnd.ENV_FAILURE, 2), turns=[])
    before = [Group(played[0].prompt, [*played, broken])]
    after = with_overlong_penalties(before, limit=3, buffer=2, factor=1.0)
    paid, made = after[0].trajectories[:2]
    assert [turn.reward for turn in paid.turns] == [0.0, 1.0]
    assert (paid.reward, made.reward) == (1.0, 1.0)
    for trajectory_ in (paid, made):
        assert sum(sum(sample.rewards) for sample in to_samples([trajectory_])) == 1.0
    assert overlong_metrics(before, after) == {"overlong/mean_penalty": -0.5, "overlong/penalized_share": 1.0}
