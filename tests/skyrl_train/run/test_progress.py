"""Bars in a terminal, a line per step elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from skyrl_train.run.progress import MovingTime, RunProgress, breakdown, clock, step_line

METRICS = {"reward/avg_raw_reward": 0.5, "timing/step": 2.0, "generate/num_sampled_tokens": 300.0}


def played(terminal: bool, **options) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with RunProgress(4, console=console, **options) as progress:
        progress.phase("rollout", total=32, unit="episodes")
        progress.advance(8)
        if progress.live is not None:
            progress.live.refresh()
        progress.phase("update", total=1, unit="tokens")
        progress.reached(500, 2000)
        if progress.live is not None:
            progress.live.refresh()
        progress.print("a line of the log [not markup]")
        progress.step_done(1, METRICS)
    return out.getvalue()


def test_plain_mode_prints_one_line_per_step():
    log, line, below = played(False).splitlines()
    assert log == "a line of the log [not markup]"
    assert re.fullmatch(r"step    1   reward  0\.500   time   2\.0 s   \[1/4\]   \d+:\d\d left", line)
    assert below == "           tokens/s 150"
    assert played(False, plain_lines=False).splitlines() == [log]


def test_a_terminal_sees_the_run_and_the_phase():
    shown = played(True)
    assert "8/32" in shown
    assert "episodes" in shown
    assert "500/2000" in shown.replace(" ", "")
    assert "1/4" in shown
    assert "reward 0.500  150 tokens/s" in shown
    assert "a line of the log [not markup]" in shown


def test_time_left_is_from_the_median_so_one_slow_step_does_not_scare():
    times = MovingTime()
    assert times.left(3) is None
    times.seconds.extend([2.0, 2.0, 100.0])
    assert times.left(3) == 6.0


def test_the_evaluation_before_training_is_no_step():
    progress = RunProgress(4, console=Console(file=io.StringIO()))
    progress.step_done(0, {"eval/all/avg_score": 0.1})
    assert len(progress.times.seconds) == 0
    progress.step_done(1, METRICS)
    assert len(progress.times.seconds) == 1


def test_failures_are_shown_only_when_there_are_any():
    assert "failures" not in step_line(1, METRICS | {"generate/env_failures": 0.0})
    assert "failures 2" in step_line(1, METRICS | {"generate/env_failures": 2.0})


def test_shares_of_what_was_in_vain_are_shown_only_when_there_are_any():
    shares = {
        "reward/equal_group_share": 0.75,
        "generate/invalid_action_share": 0.125,
        "generate/cut_reply_share": 0.004,
    }
    shown = step_line(1, METRICS | shares)
    assert "equal groups 75%" in shown
    assert "unreadable 12%" in shown
    assert "cut" not in shown  # rounds to 0%
    assert "equal" not in step_line(1, METRICS | {"reward/equal_group_share": 0.0})


def test_a_step_says_where_its_seconds_went():
    timings = {
        "timing/step": 12.4,
        "timing/generate": 7.9,
        "timing/engine": 7.2,
        "timing/fwd_logprobs_values_reward": 0.04,  # rounds to 0
        "timing/policy_train": 4.1,
        "timing/sync_weights": 0.16,
        "timing/eval": 3.0,  # after the step
    }
    shown = ["rollout 7.9 (engine 7.2)", "update 4.1", "weights 0.2", "other 0.2"]  # 12.4 - 7.9 - 0.04 - 4.1 - 0.16
    assert breakdown(timings) == shown
    lines = step_line(3, timings).splitlines()
    assert lines == ["step    3   time  12.4 s", "           " + "   ".join([*shown, "evaluation 3.0 s"])]
    assert step_line(0, {"timing/eval": 3.0}).splitlines() == ["step    0", "           evaluation 3.0 s"]


@pytest.mark.parametrize("width", [70, 80, 100])
def test_a_step_with_everything_fits_the_width_and_breaks_between_words(width):
    everything = {
        "reward/avg_raw_reward": -0.656, "eval/all/avg_score": 0.123, "policy/policy_kl": 0.0123,
        "policy/policy_entropy": 2.5, "policy/grad_norm": 23.45, "generate/avg_num_tokens": 12345.0,
        "generate/env_failures": 12.0, "reward/equal_group_share": 1.0, "generate/invalid_action_share": 1.0,
        "generate/cut_reply_share": 1.0, "timing/step": 1234.5, "timing/generate": 1000.0, "timing/engine": 900.0,
        "timing/policy_train": 200.0, "timing/sync_weights": 10.0, "timing/eval": 100.0,
        "generate/num_sampled_tokens": 1e6,
    }  # fmt: skip
    lines = step_line(1234, everything, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert (lines[0].endswith("time 1234.5 s")) is (width == 100)  # what matters is one line there
    ended = step_line(1234, everything, ["[1234/5000]", "10:31:00 left"], width).splitlines()
    assert max(map(len, ended)) <= width
    words = " ".join(ended).split()
    assert {"-0.656", "[1234/5000]", "(engine", "100%", "12345"} <= set(words)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, "0:00"), (59.2, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_loading_before_the_first_phase_is_no_step():
    progress = RunProgress(4, console=Console(file=io.StringIO()))
    progress.times.since -= 1000.0
    progress.phase("rollout", total=8, unit="episodes")
    progress.phase("update", total=8, unit="tokens")
    progress.step_done(1, METRICS)
    assert progress.times.seconds[0] < 900.0
