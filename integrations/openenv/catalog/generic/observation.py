"""Text of any server's observation: texts are kept, small boards drawn, long lists summarised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from integrations.openenv.catalog.generic.values import Legal, named

MAX_CHARS = 2000  # of the whole text
MAX_VALUE_CHARS = 1200  # of one field
MAX_LINES = 40
MAX_DEPTH = 3
SHORT_LIST, BOARD_SIDE, FIRST_SHOWN = 12, 24, 5
NOT_SHOWN = {"reward", "done", "metadata"}
LEGAL_KEYS = ("legal_actions", "legal_moves", "valid_actions", "valid_moves", "available_actions", "action_mask")
CHECKED_KEYS = set(LEGAL_KEYS) - {"available_actions"}  # which often lists forms of calls, not actions
FIRST_KEYS = (
    *("prompt", "task", "instruction", "question", "messages", "message", "text", "content", "result"),
    *("stdout", "stderr", "output", "error", "feedback", "board", "grid", "observation", "state"),
)


def observation_text(observation: dict[str, Any]) -> str:
    """Return the text of an observation, at most MAX_CHARS long plus the legal actions; "" if there is nothing."""
    shown = {
        key: value
        for key, value in observation.items()
        if key not in NOT_SHOWN and key not in LEGAL_KEYS and not _is_empty(value)
    }
    if "tool_name" in shown and ("result" in shown or "error" in shown):
        shown = _tool_answer(shown)
    _fold(shown)
    order = {key: place for place, key in enumerate(FIRST_KEYS)}
    keys = sorted(shown, key=lambda key: order.get(key, len(order)))
    lines = [line for key in keys for line in _lines(key, shown[key], alone=len(keys) == 1, depth=0)]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... ({len(lines) - MAX_LINES} more lines)"]
    legal = legal_actions(observation)
    text = _shortened("\n".join(lines), MAX_CHARS)
    return f"{text}\nLegal actions: {named(legal)}".lstrip() if legal else text


def legal_actions(observation: dict[str, Any], *, checked: bool = False) -> Legal | None:
    """Return the actions (numbers or names) that an observation allows; None if it does not say.

    checked: only under keys that certainly list actions, so that others may be refused.
    """
    for key in LEGAL_KEYS:
        values = observation.get(key)
        if not isinstance(values, list) or not values or (checked and key not in CHECKED_KEYS):
            continue
        if key.endswith("mask") and _is_mask(values):
            return [index for index, allowed in enumerate(values) if allowed]
        if all(isinstance(value, int | str) and not isinstance(value, bool) for value in values):
            return values
    return None


def _is_mask(values: list[Any]) -> bool:
    """Return whether the values are flags and not sorted action numbers.

    [0, 1] lists the actions 0 and 1; [1, 0], [1, 1] and bools are flags.
    """
    if any(value not in (0, 1) for value in values):
        return False
    return any(isinstance(value, bool) for value in values) or values != sorted(set(values))


def _fold(observation: dict[str, Any]) -> None:
    """Replace, in place, flat lists of width x height numbers by lists of rows, if a board of that size is drawn."""
    width, height = observation.get("width"), observation.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and 0 < width <= BOARD_SIDE and height <= BOARD_SIDE):
        return
    for key, value in observation.items():
        if isinstance(value, list) and len(value) == width * height and not isinstance(value[0], list):
            observation[key] = [value[row * width : (row + 1) * width] for row in range(height)]


def _tool_answer(observation: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's error if it failed, else its data, else its texts."""
    error, result = observation.get("error"), observation.get("result")
    if error:
        return {"error": error.get("message", error) if isinstance(error, dict) else error}
    if not isinstance(result, dict):
        return {"result": result}
    if result.get("data") is not None:
        return result["data"] if isinstance(result["data"], dict) else {"result": result["data"]}
    texts = [part.get("text") for part in result.get("content") or [] if isinstance(part, dict)]
    return {"result": "\n".join(text for text in texts if isinstance(text, str))}


def _lines(key: str, value: Any, *, alone: bool, depth: int) -> Iterator[str]:
    """Yield "key: value". A value of several lines follows its key; a text that is the only field needs no key."""
    label = key.replace("_", " ")
    if isinstance(value, dict) and depth < MAX_DEPTH:
        for inner, inner_value in list(value.items())[:MAX_LINES]:
            if not _is_empty(inner_value):
                yield from _lines(f"{key}.{inner}", inner_value, alone=False, depth=depth + 1)
        return
    text = _shortened(_text(value), MAX_VALUE_CHARS)
    if alone and isinstance(value, str):
        yield text
    elif "\n" in text:
        yield f"{label}:"
        yield from text.split("\n")
    else:
        yield f"{label}: {text}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip("\n")
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return _list_text(value)
    return json.dumps(value)[: MAX_VALUE_CHARS + 1] if isinstance(value, dict) else str(value)


def _list_text(values: list[Any]) -> str:
    if all(isinstance(value, str) for value in values):
        return named(values)
    if all(isinstance(value, dict) for value in values):
        return "\n".join(_message(value) for value in values[-SHORT_LIST:])
    if _is_board(values):
        width = max(len(_text(cell)) for row in values for cell in row)
        return "\n".join(" ".join(_text(cell).rjust(width) for cell in row) for row in values)
    numbers = list(_numbers(values))
    if len(values) <= SHORT_LIST and not any(isinstance(value, list | dict) for value in values):
        return f"[{', '.join(_text(value) for value in values)}]"
    if not numbers:
        return f"{len(values)} values"
    first = ", ".join(_text(number) for number in numbers[:FIRST_SHOWN])
    shape = " x ".join(str(length) for length in _shape(values))
    return f"{shape} numbers from {_text(min(numbers))} to {_text(max(numbers))}, first {first}, ..."


def _message(value: dict[str, Any]) -> str:
    """Return a message of a conversation as "role: content", any other dict as its shortened fields."""
    content = value.get("content", value.get("text"))
    if isinstance(content, str):
        who = value.get("role") or value.get("sender") or value.get("sender_id")
        return f"{who}: {content}" if isinstance(who, str | int) else content
    return ", ".join(f"{key}: {_shortened(_text(field), 80)}" for key, field in list(value.items())[:SHORT_LIST])


def _is_board(values: list[Any]) -> bool:
    """Return whether these are rows of equal length, of short numbers or words, small enough to draw."""
    if not all(isinstance(row, list) and row for row in values) or len(values) > BOARD_SIDE:
        return False
    if len({len(row) for row in values}) != 1 or len(values[0]) > BOARD_SIDE:
        return False
    cells = [cell for row in values for cell in row]
    return all(isinstance(cell, int | str | float) and len(_text(cell)) <= 6 for cell in cells)


def _numbers(values: list[Any], depth: int = 8) -> Iterator[float]:
    for value in values:
        if isinstance(value, list):
            yield from _numbers(value, depth - 1) if depth else ()
        elif isinstance(value, int | float):
            yield value


def _shape(values: Any) -> Iterator[int]:
    while isinstance(values, list):
        yield len(values)
        values = values[0] if values else None


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _shortened(text: str, limit: int) -> str:
    """Return a long text's head and tail: a task stands at the beginning, an error at the end."""
    return (
        text
        if len(text) <= limit
        else f"{text[: limit // 2]}\n... ({len(text) - limit} characters) ...\n{text[-limit // 2 :]}"
    )
