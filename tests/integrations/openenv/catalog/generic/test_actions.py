from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from integrations.openenv.catalog import InvalidAction
from integrations.openenv.catalog.generic.actions import ActionForm, ObjectForm, ValueForm, action_form
from integrations.openenv.catalog.generic.tools import Tool, ToolForm, calls_tools
from integrations.openenv.client.errors import OpenEnvError

METADATA = {"metadata": {"type": "object", "additionalProperties": True}}
OPTIONAL_INTEGER = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}


def schema(required: list[str], **properties: Any) -> dict[str, Any]:
    """Return an action's schema as pydantic writes it."""
    return {"type": "object", "required": required, "properties": {**METADATA, **properties}}


TEXT = schema(["message"], message={"type": "string", "description": "Message to echo back"})
INTEGER = schema(["column"], column={"type": "integer", "minimum": 0, "maximum": 6})
MOVE = {
    **schema(["action"], action={"$ref": "#/$defs/Move", "description": "Where to."}),
    "$defs": {"Move": {"enum": ["UP", "DOWN"], "type": "string"}},
}
NUMBERS = schema(["values"], values={"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3})
WATER = schema(["action"], action={"type": "string"}, x=OPTIONAL_INTEGER, y=OPTIONAL_INTEGER)
THROTTLE = schema(["throttle", "steer"], throttle={"type": "number"}, steer={"type": "number"}, brake={"default": 0.5})
FLAG = schema(["press"], press={"type": "boolean"})
SCHEMAS = {"text": TEXT, "integer": INTEGER, "enum": MOVE, "numbers": NUMBERS, "water": WATER, "object": THROTTLE}


def tools() -> ToolForm:
    add = {
        "name": "add",
        "description": "Adds.",
        "inputSchema": {
            "type": "object",
            "required": ["a"],
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
        },
    }
    say = {"name": "say", "input_schema": {"type": "object", "properties": {"text": {"type": "string"}}}}
    return ToolForm([Tool.from_fields(add), Tool.from_fields(say)], {"type": "call_tool"})


def fields(of: dict[str, Any], text: str, legal: Any = None) -> dict[str, Any]:
    return action_form(of).fields(text, legal)


def test_one_required_text_is_the_text_itself() -> None:
    assert fields(TEXT, " hello\nthere ") == {"message": "hello\nthere"}
    assert fields(TEXT, '{"message": "x"}') == {
        "message": '{"message": "x"}'
    }  # it is the only field: no object is meant
    assert action_form(TEXT).how() == "a text, the message (Message to echo back)"


def test_an_integer_keeps_its_bounds_and_what_is_legal_now() -> None:
    assert fields(INTEGER, "3", [0, 3]) == {"column": 3}
    with pytest.raises(InvalidAction, match=r"'1' is not legal now\. Legal: 0, 3\."):
        fields(INTEGER, "1", [0, 3])
    with pytest.raises(InvalidAction, match="column: 7 is greater than the maximum of 6"):
        fields(INTEGER, "7")
    with pytest.raises(InvalidAction, match="'left' is not a whole number from 0 to 6"):
        fields(INTEGER, "left", ["left", "right"])  # names of moves say nothing about numbers


def test_legal_texts_are_named_to_who_misses_them() -> None:
    assert fields(TEXT, "e2e4", ["e2e4", "d2d4"]) == {"message": "e2e4"}
    with pytest.raises(InvalidAction, match=r"'e2e5' is not legal now\. Legal: e2e4, d2d4\."):
        fields(TEXT, "e2e5", ["e2e4", "d2d4"])


@pytest.mark.parametrize("text", ["UP", "up", '"UP"', " Up "])
def test_an_enum_is_one_of_its_names(text: str) -> None:
    assert fields(MOVE, text) == {"action": "UP"}


def test_other_names_are_answered_with_the_right_ones() -> None:
    with pytest.raises(InvalidAction, match=r"'LEFT' is not one of UP, DOWN\."):
        fields(MOVE, "LEFT")


@pytest.mark.parametrize("text", ["[0.5, -1]", "0.5, -1", "0.5 -1", "0.5;-1.0"])
def test_numbers_are_a_list_with_or_without_brackets(text: str) -> None:
    assert fields(NUMBERS, text) == {"values": [0.5, -1]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1", "too short"),
        ("1 2 3 4", "too long"),
        ("[1, true]", "not of type"),
        ("1 nan", "JSON"),
        ("1 1e999", "no num"),
    ],
)
def test_lists_of_other_things_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidAction, match=complaint):
        fields(NUMBERS, text)


def test_a_flag_is_yes_or_no() -> None:
    assert fields(FLAG, "Yes") == {"press": True}
    with pytest.raises(InvalidAction, match="'maybe' is not true or false"):
        fields(FLAG, "maybe")


def test_a_field_with_a_default_may_be_set_by_an_object_or_left_out() -> None:
    assert fields(WATER, "wait") == {"action": "wait", "x": None, "y": None}
    assert fields(WATER, '{"action": "water", "x": 3}') == {"action": "water", "x": 3, "y": None}
    with pytest.raises(InvalidAction, match="x: 'three' is not"):
        fields(WATER, '{"action": "water", "x": "three"}')


def test_several_required_fields_are_an_object() -> None:
    assert fields(THROTTLE, '{"throttle": 1, "steer": -0.5}') == {"throttle": 1, "steer": -0.5, "brake": 0.5}
    for text, complaint in (
        ('{"throttle": 1}', "'steer' is a required property"),
        ('{"throttle": 1, "steer": 0, "horn": 1}', "There is no field 'horn'; there are throttle, steer, brake"),
        ('{"throttle": 1, "steer": 0, "metadata": {}}', "no field 'metadata'"),
        ("forward", "Your action is not JSON"),
        ("[1, 2]", 'not a JSON object. It must be a JSON object with these fields:\n- "throttle": a number'),
        ('{"throttle": "\\ud800", "steer": 0}', "a character that is no text"),
        ("[" * 5000, "nested too deeply"),
    ):
        with pytest.raises(InvalidAction) as refused:
            fields(THROTTLE, text)
        assert complaint in str(refused.value)


def test_a_tool_is_called_as_a_function_and_its_arguments_are_checked() -> None:
    form = tools()
    called = {"type": "call_tool", "tool_name": "add", "arguments": {"a": 2, "b": 1}}
    assert form.fields('{"tool": "add", "arguments": {"a": 2}}', None) == called
    assert form.fields('{"name": "add", "parameters": {"a": 2}}', None) == called
    for text, complaint in (
        ('{"tool": "sub", "arguments": {}}', '"tool" must be one of add, say.'),
        ('{"tool": ["add"]}', "must be one of"),
        ('{"tool": "add", "arguments": {"a": "two"}}', "add: a: 'two' is not of type 'integer'."),
        ('{"tool": "add", "arguments": {"a": 2, "c": 3}}', "add: There is no field 'c'"),
        ('{"tool": "add", "arguments": 2}', '"arguments" must be a JSON object, for add(a: a whole number'),
        ('{"tool": "say", "arguments": {}, "why": "x"}', "there is why, which has no meaning"),
    ):
        with pytest.raises(InvalidAction) as refused:
            form.fields(text, None)
        assert complaint in str(refused.value)
    assert "- add(a: a whole number, b?: a whole number): Adds." in form.how()


def test_a_tool_call_is_known_by_its_fields() -> None:
    call = {"tool_name": {"type": "string"}, "arguments": {"type": "object"}, "type": {"const": "call_tool"}}
    assert calls_tools(schema(["tool_name"], **call))
    assert not calls_tools(schema(["tool_name", "user"], user={"type": "string"}, **call))
    assert not calls_tools(TEXT)


def test_schemas_that_cannot_be_used_are_the_servers_fault() -> None:
    with pytest.raises(OpenEnvError, match="is not a JSON schema"):
        action_form(schema(["x"], x={"type": "whole"}))
    with pytest.raises(OpenEnvError, match="refers to what is not in it"):
        fields(schema(["x"], x={"type": "string"}, y={"$ref": "http://127.0.0.1:9/schema"}), '{"x": "a", "y": 1}')
    endless = {**schema(["x"], x={"$ref": "#/$defs/a"}), "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises((InvalidAction, OpenEnvError)):
        fields(endless, "1")


def test_a_pattern_is_left_to_the_server() -> None:
    slow = schema(["x"], x={"type": "string", "pattern": "(a+)+$"}, pattern={"type": "string", "default": ""})
    assert fields(slow, "a" * 5000 + "!")["x"].endswith("!")
    assert action_form(slow).how().count('"pattern"') == 1  # a field of that name stays


@pytest.mark.parametrize("name", [*SCHEMAS, "flag", "tools"])
def test_random_actions_are_actions(name: str) -> None:
    form = tools() if name == "tools" else action_form({**SCHEMAS, "flag": FLAG}[name])
    texts = {form.random_text(Random(seed), None) for seed in range(50)}
    assert len(texts) > 1
    for text in texts:
        form.fields(text, None)


def test_random_play_takes_legal_actions_and_words_from_the_manual() -> None:
    assert action_form(INTEGER).random_text(Random(0), [4]) == "4"
    manual = {**WATER, "description": 'action: "break", "water" or "wait"'}
    drawn = [action_form(manual).random_text(Random(seed), None) for seed in range(40)]
    assert {"break", "water", "wait"} < set(drawn)
    assert any(json.loads(text).get("x") is not None for text in drawn if text.startswith("{"))


FORMS: dict[str, tuple[ActionForm, dict[str, Any]]] = {
    name: (action_form(of), {**of, "additionalProperties": False}) for name, of in SCHEMAS.items()
}
TOOLS = tools()
json_texts = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["action", "x", "throttle", "steer", "brake", "a", "tool", "arguments"]), inner
        ),
    ),
    max_leaves=12,
).map(lambda value: json.dumps(value))
pieces = st.sampled_from(
    ["{", "[" * 3000, "9" * 5000, '"\\ud800"', "1e999", "NaN", "UP", " ", "\x00", "-", '{"tool":"add"']
)
texts = st.one_of(st.text(st.characters(), max_size=60), json_texts, st.lists(pieces, max_size=4).map("".join))


def outcome(form: ActionForm, text: str, legal: Any) -> dict[str, Any] | str:
    """The action's fields, or why it is none."""
    try:
        return form.fields(text, legal)
    except InvalidAction as refused:
        return str(refused)


@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(text=texts, legal=st.one_of(st.none(), st.just([1, 2]), st.just(["UP", "x"])))
def test_any_text_is_an_action_or_explained(text: str, legal: Any) -> None:
    for form, of in FORMS.values():
        action = outcome(form, text, legal)
        if isinstance(action, str):
            assert 0 < len(action) < 2000
        else:
            assert Draft202012Validator(of).is_valid(action)
            assert json.dumps(action, allow_nan=False).encode()
    call = outcome(TOOLS, text, legal)
    assert call if isinstance(call, str) else call["tool_name"] in ("add", "say")


def test_the_form_follows_the_number_of_fields() -> None:
    kinds = {name: type(form) for name, (form, _) in FORMS.items()}
    assert kinds == {**dict.fromkeys(SCHEMAS, ValueForm), "object": ObjectForm}


@pytest.mark.parametrize(
    ("kinds", "written", "read"),
    [
        (["string", "null"], "hello", "hello"),
        (["null", "integer"], "3", 3),
        (["number"], "0.5", 0.5),
        (["null"], "null", None),
        (["string", "integer"], '"hello"', "hello"),
    ],
)
def test_a_list_of_types_is_read_as_what_is_not_null(kinds: list[str], written: str, read: Any) -> None:
    form = action_form(schema(["x"], x={"type": kinds}))
    text = written if isinstance(form, ValueForm) else json.dumps({"x": read})
    assert form.fields(text, None) == {"x": read}
    assert form.how()
    form.fields(form.random_text(Random(0), None), None)


@pytest.mark.parametrize(
    "x",
    [
        {"type": "array", "items": {"type": "number"}, "minItems": 1_000_000_000},
        {"type": "array", "items": {"type": "object"}, "minItems": 1_000_000_000},
        {"type": "string", "minLength": 1_000_000_000},
        {"enum": ["x" * 20_000, "y" * 30_000]},
        {"const": {"a": "x" * 20_000}},
    ],
)
def test_what_is_too_long_to_be_written_is_refused_or_left_out(x: dict[str, Any]) -> None:
    with pytest.raises(OpenEnvError, match=r"in 'x', and nobody can write that"):
        action_form(schema(["x"], x=x))
    optional = action_form(schema(["y"], y={"type": "integer"}, x=x))
    assert all(len(optional.random_text(Random(seed), None)) < 100 for seed in range(20))


def test_only_names_that_can_be_written_are_drawn() -> None:
    form = action_form(schema(["x"], x={"enum": ["x" * 20_000, "up"]}))
    assert {form.random_text(Random(seed), None) for seed in range(20)} == {"up"}


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"type": "integer", "minimum": 10**400}, "a whole number"),
        ({"type": "number", "maximum": -(10**400)}, "a number"),
        ({"type": "integer", "minimum": -(10**400), "maximum": 7}, "a whole number of at most 7"),
    ],
)
def test_a_bound_that_no_float_holds_is_left_out_of_the_words(x: dict[str, Any], words: str) -> None:
    form = action_form(schema(["x"], x=x))
    assert words in form.how()
    assert " from " not in form.how()
    assert form.random_text(Random(0), None)


@pytest.mark.parametrize("x", [{"$ref": "#/nowhere"}, {"$dynamicRef": "#nobody"}])
def test_a_reference_to_nothing_is_refused_without_the_whole_schema(x: dict[str, Any]) -> None:
    of = schema(["x", "y"], x=x, y={"type": "string", "description": "long " * 10_000})
    with pytest.raises(OpenEnvError, match="refers to what is not in it") as refused:
        action_form(of).fields('{"x": 1, "y": "a"}', None)
    assert len(str(refused.value)) < 400


def test_a_required_field_that_is_not_described_is_the_servers_fault() -> None:
    with pytest.raises(OpenEnvError, match="requires a field 'z' that it does not describe"):
        action_form(schema(["z"], x={"type": "integer"}))


counts = st.sampled_from([0, 0, 1, 2, 3, 10**9])
numbers = st.one_of(
    st.integers(-3, 10), st.sampled_from([10**9, -(10**9), 10**400, -(10**400), 1e308, float("inf"), float("nan"), 0.5])
)
kinds = st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "null"])
leaves: Any = st.fixed_dictionaries(
    {},
    optional={
        "type": st.one_of(kinds, st.lists(kinds, min_size=1, max_size=3, unique=True), st.just("whole")),
        "minimum": numbers,
        "maximum": numbers,
        "exclusiveMinimum": numbers,
        "minItems": counts,
        "maxItems": counts,
        "minLength": counts,
        "maxLength": counts,
        "enum": st.lists(st.one_of(st.none(), st.text(max_size=3), st.integers(), st.just({})), min_size=1, max_size=3),
        "const": st.one_of(st.none(), st.integers()),
        "default": st.one_of(st.none(), st.text(max_size=3)),
        "description": st.text(max_size=20),
        "examples": st.lists(st.text(max_size=3)),
        "$ref": st.sampled_from(["#/properties/a", "#/$defs/loop", "#", "", "http://127.0.0.1:9/x"]),
    },
)
any_schemas: Any = st.recursive(
    st.one_of(leaves, st.booleans()),
    lambda inner: st.one_of(
        st.builds(lambda one, two: {**one, "items": two}, leaves, inner),
        st.builds(
            lambda key, some: {key: some},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda a: {"type": "object", "properties": {"a": a}, "required": ["a"]}, inner),
    ),
    max_leaves=5,
)
required_names = st.sampled_from([[], ["a"], ["b"], ["a", "b"], ["z"], "a", [{}], None])


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(a=any_schemas, b=any_schemas, required=required_names)
def test_any_schema_is_described_and_played_or_refused_with_a_reason(a: Any, b: Any, required: Any) -> None:
    of = {"properties": {"a": a, "b": b}, "$defs": {"loop": {"$ref": "#/$defs/loop"}}, "required": required}
    try:
        form = action_form(of)
        calls_tools(of)
        ToolForm([Tool.from_fields({"name": "t", "inputSchema": of})], {}).random_text(Random(0), None)
        assert form.how()
        for seed in range(5):
            text = form.random_text(Random(seed), None)
            assert len(text) < 100_000
            outcome(form, text, None)
    except OpenEnvError as refused:
        reason = str(refused)
    else:
        reason = ""
    assert reason.startswith("the server's schema") or not reason
