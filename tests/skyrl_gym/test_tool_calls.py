"""Calls of tools in the forms of several families, and replies that are no calls."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skyrl_gym.contract import WrongAnswer, checked_tool_schemas
from skyrl_gym.tool_calls import MAX_CALLS, OPEN, ToolCall, UnreadableCall, read_tool_calls, without_tool_calls, written

ADD = ToolCall("add", {"a": 1, "b": [2]})
SAY = ToolCall("say", {})
TAGS = ToolCall("say", {"x": "<think>a</think>b"})  # as an argument, no thinking of the model


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>', [ADD]),  # Qwen2.5, Qwen3
        ('<tool_call>[{"name": "add", "arguments": {"a": 1, "b": [2]}}, {"name": "say"}]</tool_call>', [ADD, SAY]),
        ('I add.\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>\nDone.', [ADD]),
        (f"{written(ADD)}\n{written(SAY)}", [ADD, SAY]),
        ('{"name": "add", "parameters": {"a": 1, "b": [2]}}', [ADD]),  # Llama 3
        ('<|python_tag|>{"name": "say", "parameters": {}}', [SAY]),
        ('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": [2]}}]', [ADD]),  # Mistral
        ('[{"name": "say", "arguments": {}}]', [SAY]),  # the same, decoded without special tokens
        (f"<think>\nMaybe {written(SAY)}?\n</think>\n\n{written(ADD)}", [ADD]),
        (f"<think>{written(SAY)}</think> No.", []),
        (f"<think>Perhaps {written(SAY)} or", []),  # a thinking that was cut off
        (f"{written(ADD)}<think>and {written(SAY)}", [ADD]),
        ('{"name": "add", "parameters": {"a": 1, "b": [2]}}; {"name": "say", "parameters": {}}', [ADD, SAY]),
        ('<|python_tag|>{"name": "say"}\n{"name": "say"};', [SAY, SAY]),
        ('{"name": "say", "parameters": {}} Done.', []),
        (
            '<tool_call>{"name": "run", "arguments": {"c": "a</tool_call>{b} \\u00e9"}}</tool_call>',
            [ToolCall("run", {"c": "a</tool_call>{b} é"})],
        ),
        (written(TAGS), [TAGS]),
        (f"Both.\n{written(ADD)}\n{written(TAGS)}", [ADD, TAGS]),
        (f"<think>{written(TAGS)}</think>{written(ADD)}", [ADD]),
        (f"So: {written(SAY)} or {OPEN}{{not </think>{written(TAGS)}", [TAGS]),  # the prompt began the thinking
        ('{"name": "say", "parameters": {"x": "<think>a</think>b"}}', [TAGS]),
        ('[TOOL_CALLS][{"name": "say", "arguments": {"x": "<think>a</think>b"}}]', [TAGS]),
        ("The answer is 3.", []),
        ("", []),
        ('{"answer": 3}', []),
        ("{not JSON", []),
        ("[1, 2]", []),
        ("[]", []),
        ('Read {"name": "add", "parameters": {}}', []),  # Llama's form is the whole reply
        ('{"name": "Alice"}', []),  # the answer to a question; Llama's form has parameters
        ('[{"name": "Alice"}, {"name": "say", "parameters": {}}]', []),
        (
            '{"name": "say", "parameters": {"x": "<tool_call>"}}',  # a tag of another family's within a text
            [ToolCall("say", {"x": "<tool_call>"})],
        ),
    ],
)
def test_calls_are_read_in_the_familys_form(reply: str, calls: list[ToolCall]) -> None:
    assert read_tool_calls(reply) == calls


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("<tool_call>{}", "does not end"),
        (f'{written(ADD)}<tool_call>{{"name": "say"', "does not end"),  # cut by length: the first is not played alone
        ("<tool_call>add(1)</tool_call>", r"no JSON: add\(1\)"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "no JSON"),
        ('<tool_call>{"name": "say", "arguments": {"x": NaN}}</tool_call>', "no JSON"),
        ("<tool_call>{}</tool_call>", '"name" and "arguments"'),
        ('<tool_call>{"name": 3}</tool_call>', '"name" and "arguments"'),
        ("<tool_call>[]</tool_call>", "1 to"),
        ('<tool_call>{"name": "say", "arguments": [1]}</tool_call>', "of say must be a JSON object"),
        ('<tool_call>{"name": "say", "arguments": "{}"}</tool_call>', "of say must be a JSON object"),
        ("<|python_tag|>print(1)", "no JSON"),
        ("<|python_tag|>", "no JSON"),
        ('<|python_tag|>{"name": "say"} and more', "no JSON"),
        ('<tool_call>{"name": "say"} and more</tool_call>', 'no JSON: {"name": "say"} and more'),
        ('<tool_call>{"name": "say", "arguments": {"x": 1e999}}</tool_call>', "no JSON"),
        ('<tool_call>{"name": "say", "arguments": {"x": "\\ud800"}}</tool_call>', "no JSON"),
        (
            '<tool_call>{"name": "say", "arguments": {"x": ' + "[" * 99 + "]" * 99 + "}}</tool_call>",
            "more than 100 deep",
        ),
        ('<|python_tag|>{"name": "say", "arguments": {"x": ' + '{"x": ' * 500 + "1" + "}" * 502, "more than 100 deep"),
        ('<tool_call>{"name": "say", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>", "no JSON"),
        ("<|python_tag|>" + '{"name": "say"};' * (MAX_CALLS + 1), f"more than {MAX_CALLS}"),
        (written(SAY) * (MAX_CALLS + 1), f"more than {MAX_CALLS}"),
    ],
)
def test_what_cannot_be_read_is_said_to_the_model(reply: str, says: str) -> None:
    with pytest.raises(UnreadableCall, match=says):
        read_tool_calls(reply)


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "</think>",
    '{"name": "a", "arguments": {}}',
    "[",
    "]",
    "{",
    "}",
    "\ud800",
    " ",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join))
def test_no_reply_raises_anything_else(reply: str) -> None:
    with suppress(UnreadableCall):
        assert all(isinstance(call, ToolCall) for call in read_tool_calls(reply))
    with suppress(UnreadableCall):
        assert without_tool_calls(reply) in reply


NAMES = ['"add"', '"nothing"', "3", "null", '"\\ud800"', '["add"]', '""']
LEAVES = [
    "1",
    "-0",
    "1e999",
    "NaN",
    "Infinity",
    "9" * 400,
    "9" * 4400,
    "null",
    '"</tool_call>"',
    '"<tool_call>"',
    '"\\u0000"',
]
DEPTHS = (1, 50, 98, 99, 300, 480, 495, 900, 960, 985, 995, 1000, 3000)


@st.composite
def hostile_calls(draw: st.DrawFn) -> str:
    """A call with duplicate keys, arguments of any type and depth, perhaps cut, in tags, marks, text, or bare."""
    value, depth = draw(st.sampled_from(LEAVES)), draw(st.sampled_from(DEPTHS))
    nested = draw(
        st.sampled_from(("{}", value, "[" * depth + value + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    )
    arguments = draw(st.sampled_from(("{}", "[]", "null", '"{}"', nested, f'{{"a": {nested}}}')))
    pairs = [
        f'"name": {draw(st.sampled_from(NAMES))}',
        f'"{draw(st.sampled_from(["arguments", "parameters", "args"]))}": {arguments}',
    ]
    pairs += draw(st.lists(st.sampled_from(pairs), max_size=1))
    call = "{" + ", ".join(draw(st.permutations(pairs))) + "}"
    call = call[: draw(st.integers(0, len(call)))] if draw(st.integers(0, 4)) == 0 else call
    return draw(st.sampled_from(("", "", "I add. "))) + draw(
        st.sampled_from(
            ("{}", "<tool_call>{}</tool_call>", "<tool_call>\n{}\n</tool_call>", "<|python_tag|>{}", "[TOOL_CALLS][{}]")
        )
    ).replace("{}", call)


def in_a_deep_stack(num_frames: int, call: Callable[[], Any]) -> Any:
    return call() if num_frames == 0 else in_a_deep_stack(num_frames - 1, call)


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(hostile_calls(), min_size=1, max_size=3).map("".join))
def test_what_was_read_can_be_written_sent_and_read_wherever_the_stack_stands(reply: str) -> None:
    calls: list[ToolCall] = []
    with suppress(UnreadableCall):
        calls = read_tool_calls(reply)
    again = "".join(written(call) for call in calls)
    assert in_a_deep_stack(400, lambda: read_tool_calls(again)) == calls
    if calls:
        assert in_a_deep_stack(400, lambda: without_tool_calls(reply)) in reply
    for call in calls:
        assert call.name in ("add", "nothing", "")
        in_a_deep_stack(400, lambda call=call: json.dumps(call.arguments, ensure_ascii=False).encode())
        assert in_a_deep_stack(400, lambda call=call: copy.deepcopy(call)) == call


@given(st.text(), st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none(), max_size=4))
def test_a_written_call_is_read_again(name: str, arguments: dict[str, Any]) -> None:
    call = ToolCall(name, arguments)
    tags = ("<think>", "</think>")
    if not any(tag in json.dumps([name, arguments], ensure_ascii=False) for tag in tags):
        assert read_tool_calls(written(call)) == [call]


def test_the_text_in_front_of_a_call_is_what_was_said() -> None:
    assert without_tool_calls(f"I add. {written(ADD)}") == "I add."
    assert without_tool_calls('{"name": "say", "parameters": {}}') == ""
    assert without_tool_calls("Just words.") == "Just words."


@pytest.mark.parametrize(
    "schemas",
    [
        {},
        [{}],
        ["add"],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": 1}}],
        [{"type": "function", "function": {"name": "add", "parameters": {1, 2}}}],
    ],
)
def test_an_environments_tools_must_be_functions(schemas: Any) -> None:
    with pytest.raises(WrongAnswer, match="tool"):
        checked_tool_schemas(schemas)
    assert checked_tool_schemas(None) == []
