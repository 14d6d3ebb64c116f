from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integrations.openenv.catalog.generic.observation import MAX_CHARS, legal_actions, observation_text


def test_a_text_alone_needs_no_name() -> None:
    assert observation_text({"question": "What is 2 + 2?", "score": None, "metadata": {"a": 1}}) == "What is 2 + 2?"


def test_texts_come_first_and_numbers_follow() -> None:
    assert observation_text({"x": 0, "y": 1.23456, "message": "Keep going.", "done": False, "reward": 1}) == (
        "message: Keep going.\nx: 0\ny: 1.235"
    )


def test_a_board_is_drawn_and_the_legal_actions_named() -> None:
    assert observation_text({"board": [[0, 1], [-1, 0]], "legal_actions": [0, 2]}) == (
        "board:\n 0  1\n-1  0\nLegal actions: 0, 2"
    )


def test_a_flat_grid_is_folded_by_its_width() -> None:
    assert observation_text({"grid": [1, 2, 3, 4, 5, 6], "width": 3, "height": 2}).startswith("grid:\n1 2 3\n4 5 6\n")


def test_long_vectors_are_summarised_never_dumped() -> None:
    text = observation_text({"screen": list(range(100_800)), "screen_shape": [210, 160, 3]})
    assert text == ("screen: 100800 numbers from 0 to 100799, first 0, 1, 2, 3, 4, ...\nscreen shape: [210, 160, 3]")
    assert "1 x 40 x 50 numbers from 0.5 to 0.5" in observation_text({"frames": [[[0.5] * 50] * 40]})


def test_long_texts_keep_head_and_tail() -> None:
    text = observation_text({"stdout": "begin" + "x" * 50_000 + "ValueError: end"})
    assert len(text) < 1300
    assert text.startswith("begin")
    assert text.endswith("ValueError: end")


def test_a_conversation_reads_as_turns() -> None:
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert observation_text({"messages": messages}) == "messages:\nuser: Hi.\nassistant: Hello."


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"result": {"data": "hello", "content": [{"type": "text", "text": "hello"}]}, "error": None}, "hello"),
        ({"result": {"data": None, "content": [{"type": "text", "text": "a"}, {"type": "image"}]}}, "a"),
        ({"result": {"data": {"message": "hi", "length": 2}}}, "message: hi\nlength: 2"),
        ({"result": None, "error": {"error_type": "x", "message": "no such tool"}}, "no such tool"),
    ],
)
def test_a_tools_answer_is_what_it_said(answer: dict[str, Any], text: str) -> None:
    assert observation_text({"tool_name": "t", **answer}) == text


@pytest.mark.parametrize(
    ("observation", "legal"),
    [
        ({"legal_actions": [0, 2]}, [0, 2]),
        ({"legal_moves": ["e2e4"]}, ["e2e4"]),
        ({"action_mask": [0, 1]}, [0, 1]),  # in order and without repetition: the actions themselves
        ({"action_mask": [1, 0]}, [0]),
        ({"action_mask": [1, 1]}, [0, 1]),
        ({"action_mask": [False, True]}, [1]),
        ({"legal_actions": [{"id": 1}]}, None),
        ({"legal_actions": []}, None),
    ],
)
def test_legal_actions_are_read_as_numbers_names_or_flags(observation: dict[str, Any], legal: Any) -> None:
    assert legal_actions(observation) == legal


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=300)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=10), inner)),
    max_leaves=15,
)
keys = st.sampled_from(
    ["board", "messages", "result", "tool_name", "error", "width", "height", "legal_actions", "x", "action_mask"]
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(observation=st.dictionaries(keys, json_values))
def test_whatever_a_server_sends_is_a_bounded_text(observation: dict[str, Any]) -> None:
    assert len(observation_text(observation)) < MAX_CHARS + 3000  # the legal actions come on top


def test_deep_nesting_is_no_trouble() -> None:
    nested: Any = 1
    for _ in range(900):
        nested = [nested]
    assert len(observation_text({"x": nested, "y": {"a": {"b": {"c": {"d": {"e": 1}}}}}})) < 5000
