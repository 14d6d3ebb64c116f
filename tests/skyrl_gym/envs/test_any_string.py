"""Every built-in environment accepts any string of any size as a reply."""

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skyrl_gym
from skyrl_gym.check import example_extras
from skyrl_gym.contract import wrong_step
from skyrl_gym.metrics import INVALID_ACTIONS

ENVS = ["aime", "arithmetic", "gsm8k", "gsm8k_multi_turn", "lcb", "search", "searchcode", "text2sql"]
TAGS = ["answer", "search", "sql", "solution", "think", "tool", "python", "observation", "information"]
PIECES = [
    *(f"<{tag}>" for tag in TAGS),
    *(f"</{tag}>" for tag in TAGS),
    *("#### ", "Answer: ", "```", "```python\n", "\\frac", "\\boxed{", "}", "$", "\n", "\x00", "\ud800", "🏴"),
    *("1", "42", "-", ",", ".", "1e9", "SELECT ", "* ", "FROM pets", "name ", ";", "'", "--", "(", "print", ")"),
]
any_text = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates and control characters too
pieces = st.sampled_from(PIECES)
repeated = st.builds(lambda piece, times: piece * times, pieces, st.sampled_from([2, 2, 30, 1000, 200_000]))
replies = st.lists(st.one_of(pieces, pieces, any_text, repeated), max_size=12).map("".join)


def make(env_id: str, env_configs: dict[str, dict[str, Any]], max_turns: int):
    extras = example_extras(env_id)[0]
    return skyrl_gym.make(
        env_id, env_config=env_configs.get(env_id, {}), extras={**extras, "max_turns": max_turns, "seed": 0}
    )


@pytest.mark.parametrize("env_id", ENVS)
def test_no_reply_raises_and_every_step_keeps_the_contract(env_id, env_configs):
    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(replies, min_size=2, max_size=2))
    def play(texts: list[str]) -> None:
        with make(env_id, env_configs, max_turns=2) as env:
            for text in texts:
                step = env.step(text)
                assert wrong_step(step) == ""
                if step["done"]:
                    break
            assert step["done"]

    play()


@pytest.mark.parametrize("env_id", ENVS)
def test_every_environment_counts_the_replies_that_hold_no_action(env_id, env_configs):
    with make(env_id, env_configs, max_turns=1) as env:
        env.step("I would rather not say.")
        assert env.get_metrics()[INVALID_ACTIONS] == 1
    with make(env_id, env_configs, max_turns=2) as env:
        env.init([])
        for action in env.gold_actions():
            env.step(action)
        assert env.get_metrics()[INVALID_ACTIONS] == 0


@pytest.mark.parametrize("env_id", ENVS)
@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer><answer>", "<solution></sql>", "#### 1", "Answer: \\frac", "```\n", "<tool><a>"]
)
def test_a_megabyte_is_answered_in_linear_time(env_id, piece, env_configs):
    start = time.perf_counter()
    make(env_id, env_configs, max_turns=1).step(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 60  # linear: milliseconds; quadratic: hours
