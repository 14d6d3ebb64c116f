"""Tools, calls of them and their answers as plain text: for chat templates that do not print them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from skyrl_gym.tool_calls import CLOSE, OPEN, manual_of
from skyrl_train.types import Message


def with_tools_in_words(messages: Sequence[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Return the messages with the tools behind the first one's text, and calls and answers as texts of messages."""
    first, *others = [_spelled_out(message) for message in messages]
    return [{**first, "content": f"{first['content']}\n\n{manual_of(tools)}"}, *others]


def _spelled_out(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    fields: dict[str, Any] = dict(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in fields.pop("tool_calls", ())]
    texts = [fields["content"], *(f"{OPEN}{call}{CLOSE}" for call in calls)]
    return {**fields, "content": "\n".join(text for text in texts if text)}
