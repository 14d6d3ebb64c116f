"""Turns as rows of their own: joined where the next one goes on from the one before, and never trained twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skyrl_train.batch.packing import micro_cuts, pack
from skyrl_train.batch.prefix_tree import share_prefixes
from skyrl_train.batch.samples import to_samples
from skyrl_train.batch.steps import merged, steps
from skyrl_train.types import EpisodeEnd, Prompt, Sample, Trajectory, Turn


def row(prompt, response, mask=None, rewards=None, trajectory="p_0"):
    """A row as a generator gives it: the logprob of a sampled token is minus a tenth of its id."""
    mask = [True] * len(response) if mask is None else [bool(bit) for bit in mask]
    before = len(prompt)
    logprobs = [-token / 10 if bit else 0.0 for token, bit in zip(response, mask, strict=True)]
    return Sample(
        input_ids=[*prompt, *response],
        loss_mask=[False] * before + mask,
        rollout_logprobs=[0.0] * before + logprobs,
        rewards=[0.0] * before + (rewards or [0.0] * len(response)),
        num_prompt_tokens=before,
        group_id="p",
        trajectory_id=trajectory,
    )


def episode(num_turns: int, *, reasons: bool) -> list[Turn]:
    """Turns of 20 sampled tokens (10 of them reasoning) and 10 of the environment, behind a prompt of 40.

    reasons: the history keeps none of the reasoning, as many chat templates do it.
    """
    turns, history, token = [], list(range(40)), 100
    for _ in range(num_turns):
        reply = list(range(token, token + 20))
        turns.append(Turn(history, reply, [-0.5] * 20, 1.0, "", "stop", 0))
        history = [*history, *(reply[10:] if reasons else reply), *range(token + 20, token + 30)]
        token += 30
    return turns


def played(turns: list[Turn]) -> Trajectory:
    return Trajectory(Prompt("p", [], "env"), 0, 0, [], turns, EpisodeEnd.FINISHED)


def test_turns_that_go_on_are_one_row_token_for_token():
    first = row([1, 2], [5, 6, 9], mask=[1, 1, 0], rewards=[0.0, 0.5, 0.0])
    [joined] = merged([first, row([1, 2, 5, 6, 9], [7], rewards=[2.0])])
    assert joined.input_ids == [1, 2, 5, 6, 9, 7]
    assert joined.loss_mask == [False, False, True, True, False, True]
    assert joined.rollout_logprobs == [0, 0, -0.5, -0.6, 0, -0.7]
    assert joined.rewards == [0, 0, 0, 0.5, 0, 2.0]
    assert joined.num_prompt_tokens == 2


def test_what_stands_behind_the_last_sampled_token_may_differ():
    # SkyRL's rows end with the observation; the next prompt prints it with other tokens around it
    [joined] = merged([row([1, 2], [5, 6, 9], mask=[1, 1, 0]), row([1, 2, 5, 6, 3, 9, 4], [7])])
    assert joined.input_ids == [1, 2, 5, 6, 3, 9, 4, 7]
    assert [i for i, bit in enumerate(joined.loss_mask) if bit] == [2, 3, 7]


@pytest.mark.parametrize(
    "second",
    [
        row([1, 2, 5, 9], [7]),  # the history was edited
        row([1, 2, 5], [6, 7]),  # the same tokens, sampled again: both are trained
        row([1, 2], [5, 6]),  # from the same prompt once more
        row([1, 2, 5, 6, 9], [7], trajectory="p_1"),  # another episode
        row([1], [2, 5, 6, 9, 7], mask=[0, 0, 0, 0, 1], rewards=[0, 0, 1.0, 0, 0]),  # pays a token of the row before
    ],
)
def test_anything_else_stays_a_row_of_its_own(second):
    first = row([1, 2], [5, 6])
    assert merged([first, second]) == [first, second]


def test_masked_turns_are_not_in_the_way_and_a_paid_one_keeps_its_reward():
    first, last = row([1, 2], [5, 6], rewards=[0.0, 1.0]), row([1, 2, 5, 6, 9, 7, 9], [8])
    masked = row([1, 2, 5, 6, 9], [7], mask=[0])
    [joined] = merged([first, masked, last])
    assert [i for i, bit in enumerate(joined.loss_mask) if bit] == [2, 3, 7]
    [joined] = merged([first, replace(masked, rewards=[0.0] * 5 + [4.0]), last])
    assert joined.rewards == [0, 0, 0, 1.0, 0, 4.0, 0, 0]
    assert merged([masked]) == [masked]


def test_steps_are_the_turns_and_joined_again_they_are_the_row():
    whole = row([1, 2], [5, 6, 9, 7, 9, 8], mask=[1, 1, 0, 1, 0, 1], rewards=[0, 1.0, 0, 2.0, 0, 3.0])
    parts = steps(whole)
    assert [part.input_ids for part in parts] == [[1, 2, 5, 6, 9], [1, 2, 5, 6, 9, 7, 9], [1, 2, 5, 6, 9, 7, 9, 8]]
    assert [part.num_prompt_tokens for part in parts] == [2, 5, 7]
    assert [sum(part.rewards) for part in parts] == [1.0, 2.0, 3.0]
    assert [sum(part.loss_mask) for part in parts] == [2, 1, 1]
    assert merged(parts) == [whole]


def test_an_episode_costs_its_tokens_and_not_their_square():
    """8 turns: 40 tokens of the prompt, 8 x 20 sampled, 7 x 10 of the environment."""
    for num_turns, num_tokens in ((8, 270), (16, 510)):
        [joined] = to_samples([played(episode(num_turns, reasons=False))])
        assert len(joined.input_ids) == 40 + num_turns * 20 + (num_turns - 1) * 10 == num_tokens
        assert merged(steps(joined)) == [joined]
    apart = steps(to_samples([played(episode(8, reasons=False))])[0])
    assert sum(len(part.input_ids) for part in apart) == 8 * 40 + 36 * 20 + (36 - 1) * 10 == 1390


def test_where_reasoning_is_left_out_of_the_history_rows_are_many_and_what_they_share_is_computed_once():
    """Each row adds 20 sampled tokens, the 10 that the history keeps once more, and 10 of the environment."""
    for num_turns, num_tokens, num_computed in ((8, 8 * 60 + 28 * 20, 340), (16, 16 * 60 + 120 * 20, 660)):
        samples = to_samples([played(episode(num_turns, reasons=True))])
        assert len(samples) == num_turns
        assert [sum(sample.loss_mask) for sample in samples] == [20] * num_turns
        batch = pack(samples)
        assert batch.num_tokens == num_tokens
        computed = len(share_prefixes(batch).input_ids)
        assert computed == 40 + num_turns * 20 + (num_turns - 1) * 20 == num_computed
        assert micro_cuts(batch, max_tokens=computed) == [list(range(num_turns))]
