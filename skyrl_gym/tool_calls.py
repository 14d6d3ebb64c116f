"""Calls of tools, read from a reply in the form that the model's family was taught.

    Qwen2.5, Qwen3, SmolLM2 and 3, Hermes   <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, also several
    Llama 3.1 to 3.3                        {"name": "add", "parameters": {"a": 1}}, and nothing else but more of them
    Mistral                                 [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]

The forms cannot be confused, so nobody has to say which model it is. Calls within a model's thinking do not count, and
neither do those behind a thinking that was cut off.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINKING, END_OF_THINKING = "<think>", "</think>"
_MARKS = ("<|python_tag|>", "[TOOL_CALLS]")  # in front of bare JSON; most tokenizers leave them out of the text
_ARGUMENTS = ("arguments", "parameters")
MAX_CALLS = 100  # of one reply
MAX_DEPTH = 100  # of lists and objects in each other; Python bears about 1000, less where the stack is deep already
MAX_SHOWN = 100  # characters of what cannot be read


class UnreadableCall(ValueError):
    """A reply that begins a call of a tool which cannot be read. The message is for the model."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the tool `name`. The arguments are whatever JSON the model wrote: check them."""

    name: str
    arguments: dict[str, Any]


def read_tool_calls(reply: str) -> list[ToolCall]:
    """Return the calls in the order in which they stand in the reply; none if it is plain text.

    UnreadableCall: a call does not end, or is no JSON object with a name and arguments.
    """
    said = _spoken(reply)
    if bare := _bare(said):
        return bare
    if OPEN in said:
        return _tagged(said)
    said, is_marked = _without_mark(said.strip())
    return _in_a_row(said) if is_marked else []


def without_tool_calls(reply: str) -> str:
    """Return the text of a reply in front of its first call."""
    if _bare(_spoken(reply)):
        return ""
    before, found, _ = reply.partition(OPEN)
    if found:
        return before.strip()
    return "" if read_tool_calls(reply) else reply


def _spoken(reply: str) -> str:
    """Return the reply without the model's thinking. What a call holds, such a tag too, is no thinking."""
    if _bare(reply):
        return reply
    start, end, place, num_calls = 0, len(reply), 0, 0
    while tag := _TAGS.search(reply, place):
        place = tag.end()
        if tag[0] == END_OF_THINKING:
            start, end = place, len(reply)
        elif tag[0] == THINKING:
            end = min(end, tag.start())
        elif num_calls < MAX_CALLS:
            num_calls += 1
            with suppress(UnreadableCall):
                _, place = _decoded(reply, place)
    return reply[start:end]


def _bare(said: str) -> list[ToolCall]:
    """Return the calls of a text that is nothing but JSON objects with a name and arguments; else none.

    An object with a name alone may be the answer to a question.
    """
    if not said.lstrip().startswith(("{", "[")):
        return []
    try:
        return _in_a_row(said.strip(), needs_arguments=True)
    except UnreadableCall:
        return []  # JSON, or nearly, that was not said to be a call


def written(call: ToolCall) -> str:
    """Return a call as most families write it."""
    return f"{OPEN}{json.dumps({'name': call.name, 'arguments': call.arguments}, ensure_ascii=False)}{CLOSE}"


def manual_of(tool_schemas: list[dict[str, Any]]) -> str:
    """Return a text that says which tools there are and how to call them, for templates that do not print tools."""
    lines = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in tool_schemas)
    return (
        f"You can call these tools:\n<tools>\n{lines}\n</tools>\n\n"
        f'To call one, write a JSON object with its name and arguments: {OPEN}{{"name": ..., "arguments": ...}}{CLOSE}'
    )


def nests_deeper(value: Any, limit: int) -> bool:
    """Return whether more than `limit` lists and objects of a JSON value stand in each other."""
    level = [value]
    for _ in range(limit + 1):
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return False
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return True


def _tagged(said: str) -> list[ToolCall]:
    """Return the calls between tags. A string in a call may hold a tag. Takes time linear in the length of the text."""
    found: list[ToolCall] = []
    place, num_tags = said.find(OPEN), 0
    while place >= 0:
        num_tags += 1
        if num_tags > MAX_CALLS:
            raise UnreadableCall(f"Your reply has more than {MAX_CALLS} calls.")
        start = place + len(OPEN)
        value, end = _decoded(said, start, up_to=CLOSE)
        if not said.startswith(CLOSE, end):
            _refuse(said, start, up_to=CLOSE)
        found += _calls(value)
        place = said.find(OPEN, end)
    return found


def _in_a_row(said: str, *, needs_arguments: bool = False) -> list[ToolCall]:
    """Return the calls of a text that holds nothing else; between two of them may stand a semicolon."""
    found: list[ToolCall] = []
    place = 0
    while place < len(said) or not found:
        value, place = _decoded(said, place)
        found += _calls(value, needs_arguments=needs_arguments)
        if len(found) > MAX_CALLS:
            raise UnreadableCall(f"Your reply has more than {MAX_CALLS} calls.")
        place = _end_of(_BETWEEN, said, place)
    return found


def _without_mark(said: str) -> tuple[str, bool]:
    for mark in _MARKS:
        if said.startswith(mark):
            return said.removeprefix(mark), True
    return said, False


def _decoded(said: str, start: int, up_to: str = "") -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and the position of what stands behind it and white space."""
    try:
        value, end = _DECODER.raw_decode(said, _end_of(_SPACE, said, start))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent to any tool
    except (ValueError, RecursionError):
        _refuse(said, start, up_to)
    if nests_deeper(value, MAX_DEPTH):
        raise UnreadableCall(f"Your call is nested more than {MAX_DEPTH} deep.")
    return value, _end_of(_SPACE, said, end)


def _end_of(pattern: re.Pattern[str], said: str, start: int) -> int:
    """Return where a pattern that may be empty ends."""
    found = pattern.match(said, start)
    return start if found is None else found.end()


def _refuse(said: str, start: int, up_to: str) -> NoReturn:
    end = said.find(up_to, start) if up_to else len(said)
    if end < 0:
        raise UnreadableCall(f"Your call does not end. Write {up_to} behind it.") from None
    raise UnreadableCall(f"Your call is no JSON: {said[start:end].strip()[:MAX_SHOWN]}") from None


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
_TAGS = re.compile("|".join(map(re.escape, (OPEN, *_MARKS, THINKING, END_OF_THINKING))))
_SPACE, _BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*;?[ \t\r\n]*")


def _calls(value: Any, *, needs_arguments: bool = False) -> list[ToolCall]:
    """Return the call that a JSON object is, or those in a list of them."""
    calls = value if isinstance(value, list) else [value]
    if not calls or len(calls) > MAX_CALLS:
        raise UnreadableCall(f"A list of calls has 1 to {MAX_CALLS} of them.")
    return [_call(call, needs_arguments=needs_arguments) for call in calls]


def _call(value: Any, *, needs_arguments: bool) -> ToolCall:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or (needs_arguments and not value.keys() & set(_ARGUMENTS)):
        raise UnreadableCall('A call is a JSON object with "name" and "arguments".')
    arguments = next((value[key] for key in _ARGUMENTS if key in value), {})
    if not isinstance(arguments, dict):
        raise UnreadableCall(f'The "arguments" of {name[:MAX_SHOWN]} must be a JSON object.')
    return ToolCall(name, arguments)
