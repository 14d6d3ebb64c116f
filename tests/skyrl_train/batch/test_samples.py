"""Provenance: what the engine sampled is what is trained on."""

from dataclasses import replace

import pytest

from skyrl_train.batch.samples import num_unplaced_rewards, to_samples
from skyrl_train.types import EpisodeEnd, Prompt, Trajectory, Turn
from tests.skyrl_train.batches import sample


def turn(prompt_ids, response_ids, reward=0.0):
    logprobs = [-token / 10 for token in response_ids]
    return Turn(prompt_ids, response_ids, logprobs, reward, text="", stop_reason="stop", policy_version=0)


def trajectory(*turns, uid="p", repetition=0, end=EpisodeEnd.FINISHED):
    return Trajectory(Prompt(uid, [], "env"), repetition, seed=0, messages=[], turns=list(turns), end=end)


def test_turns_that_extend_the_history_make_one_sample():
    [sample] = to_samples([trajectory(turn([1, 2], [5, 6], 0.25), turn([1, 2, 5, 6, 9], [7], 1.0))])
    assert sample.input_ids == [1, 2, 5, 6, 9, 7]
    assert sample.loss_mask == [False, False, True, True, False, True]
    assert sample.rollout_logprobs == [0.0, 0.0, -0.5, -0.6, 0.0, -0.7]
    assert sample.rewards == [0.0, 0.0, 0.0, 0.25, 0.0, 1.0]
    assert (sample.num_prompt_tokens, sample.group_id, sample.trajectory_id) == (2, "p", "p_0")


def test_an_edited_history_opens_a_new_sample_which_trains_only_its_own_reply():
    first, second = to_samples([trajectory(turn([1, 2], [5, 6], 0.25), turn([1, 2, 6, 9], [7], 1.0), repetition=3)])
    assert (first.input_ids, first.rewards) == ([1, 2, 5, 6], [0.0, 0.0, 0.0, 0.25])
    assert (second.input_ids, second.loss_mask) == ([1, 2, 6, 9, 7], [False] * 4 + [True])
    assert second.rewards == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert first.trajectory_id == second.trajectory_id == "p_3"


def test_a_shortened_history_opens_a_new_sample():
    first, second = to_samples([trajectory(turn([1, 2], [5, 6]), turn([1, 2, 5], [7]))])
    assert first.input_ids == [1, 2, 5, 6]
    assert second.input_ids == [1, 2, 5, 7]


def test_the_reward_of_a_turn_without_tokens_goes_to_the_last_sampled_token():
    [sample] = to_samples([trajectory(turn([1], [5], 0.25), turn([1, 5, 9], [], 1.0))])
    assert sample.input_ids == [1, 5, 9]
    assert sample.rewards == [0.0, 1.25, 0.0]


def test_the_reward_of_a_turn_without_tokens_reaches_back_over_an_edited_history():
    [sample] = to_samples([trajectory(turn([1], [5], 0.25), turn([2], [], 1.0))])
    assert (sample.input_ids, sample.rewards) == ([1, 5], [0.0, 1.25])


def test_a_reward_before_any_sampled_token_is_counted():
    played = trajectory(turn([1], [], 0.5), turn([1, 9], [7], 1.0))
    [sample] = to_samples([played])
    assert (sample.input_ids, sample.rewards) == ([1, 9, 7], [0.0, 0.0, 1.0])
    unlucky = trajectory(turn([1], [], 0.5), turn([1, 8], []), turn([1, 8, 9], [], 0.5))
    assert num_unplaced_rewards([played, trajectory(turn([1], [5], 0.5)), unlucky]) == 1 + 0 + 2


def test_a_reward_that_a_generator_put_before_its_first_sampled_token_is_counted():
    def given(mask, rewards):
        played = trajectory(turn([1, 2], [5, 6]))
        return replace(played, samples=[sample(mask, rewards, group="p", trajectory="p_0")])

    assert num_unplaced_rewards([given("00101", [0.0, 0.5, 0.0, 0.0, 1.0])]) == 1
    assert num_unplaced_rewards([given("00101", [0.0, 0.0, 0.5, 0.5, 1.0])]) == 0
    assert num_unplaced_rewards([given("00000", [0.0, 0.5, 0.5, 0.5, 1.0])]) == 0  # left out on purpose


def test_nothing_sampled_gives_no_sample():
    assert to_samples([trajectory(), trajectory(turn([1], []))]) == []


def test_an_environment_failure_gives_no_sample():
    failed = trajectory(turn([1], [5], 1.0), end=EpisodeEnd.ENV_FAILURE)
    assert to_samples([failed]) == []
    assert num_unplaced_rewards([failed]) == 0


def test_a_reply_to_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="first token"):
        to_samples([trajectory(turn([], [5]))])
