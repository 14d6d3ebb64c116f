"""The warning that training stands still: when it comes, and which causes and settings it names."""

from __future__ import annotations

import pytest

from skyrl_train.run.standstill import Standstill

PLAYED = {"generate/num_sampled_tokens": 640.0, "generate/num_episodes": 16.0, "loss/num_trained_tokens": 600.0}
LEARNED = PLAYED | {"policy/grad_norm": 0.3, "reward/equal_group_share": 0.5, "loss/avg_raw_advantages_abs": 0.4}
EQUAL = PLAYED | {"reward/equal_group_share": 1.0, "reward/avg_raw_reward": 0.25, "loss/avg_raw_advantages_abs": 0.0}


def warnings(*steps: dict[str, float]) -> list[str | None]:
    standstill = Standstill()
    return [standstill.after(step) for step in steps]


def the_warning(*steps: dict[str, float]) -> str:
    *before, last = warnings(*steps)
    assert before == [None, None]
    assert last is not None
    assert "\n" not in last
    return last


def test_the_third_step_in_a_row_warns_once_and_a_new_spell_warns_again():
    said = warnings(EQUAL, EQUAL, LEARNED, EQUAL, EQUAL, EQUAL, EQUAL, EQUAL, EQUAL, LEARNED, EQUAL, EQUAL, EQUAL)
    assert [number for number, text in enumerate(said, start=1) if text] == [6, 13]


def test_the_length_of_the_spell_is_known():
    standstill = Standstill()
    lengths = []
    for step in (LEARNED, EQUAL, EQUAL, EQUAL, EQUAL, LEARNED):
        standstill.after(step)
        lengths.append(standstill.num_steps)
    assert lengths == [0, 1, 2, 3, 4, 0]


def test_a_gradient_of_exactly_zero_has_learned_nothing():
    assert the_warning(*[EQUAL | {"policy/grad_norm": 0.0}] * 3)


def test_the_shares_are_means_of_the_three_steps_and_the_settings_are_named():
    text = the_warning(
        EQUAL | {"generate/invalid_action_share": 1.0, "generate/cut_reply_share": 0.25},
        EQUAL | {"generate/invalid_action_share": 0.94, "generate/cut_reply_share": 0.48},
        EQUAL | {"generate/invalid_action_share": 0.94, "generate/cut_reply_share": 0.50},
    )
    assert text == (
        "nothing could be learned for 3 steps: all rewards of each group are equal (mean reward 0.25); "
        "96% of actions were unreadable; 41% of replies were cut by length. "
        "Try: a higher generator.sampling_params.temperature or generator.n_samples_per_prompt, or tasks that the "
        "policy solves now and then; show in the prompt how an action is written, with an example; "
        "a larger generator.sampling_params.max_generate_length, or a prompt that asks for short replies"
    )


def test_small_shares_are_told_without_advice_and_tiny_ones_not_at_all():
    text = the_warning(*[EQUAL | {"generate/invalid_action_share": 0.1, "generate/cut_reply_share": 0.004}] * 3)
    assert "10% of actions were unreadable" in text
    assert "how an action is written" not in text
    assert "cut by length" not in text
    assert "max_generate_length" not in text


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"generate/num_sampled_tokens": 0.0}, "3 steps: no episode sampled a token. Try: generator.max_input_length"),
        (
            {"loss/num_trained_tokens": 0.0, "generate/truncated": 12.0, "loss/avg_raw_advantages_abs": 0.0},
            "no sampled token is left in the loss (75% of episodes were ended by a length limit). "
            "Try: generator.apply_overlong_filtering=false",
        ),
        ({"policy/loss_metrics/outlier_seq_masked_ratio": 1.0}, "off_policy_correction dropped 100% of samples"),
        (
            {"policy/num_skipped_steps": 2.0},
            "2 optimizer steps of each training step had a gradient that is not",
        ),
        ({"reward/unplaced_turns": 4.0}, "4 rewards a step were paid before the first sampled token"),
        ({"generate/env_failures": 8.0}, "50% of episodes failed in their environments"),
        ({"loss/avg_raw_advantages_abs": 0.0}, "every advantage is 0 although the rewards differ"),
        ({}, "no optimizer step had a gradient, although the rewards differ. Try: look at the episodes"),
    ],
)
def test_every_cause_is_named(metrics, words):
    differing = PLAYED | {"reward/equal_group_share": 0.0, "loss/avg_raw_advantages_abs": 0.4}
    assert words in the_warning(*[differing | metrics] * 3)
