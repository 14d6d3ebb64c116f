"""The answer in a reply to a word problem."""

from __future__ import annotations

import re
from decimal import Decimal

from skyrl_gym.reply import number

_ANSWER = re.compile(r"####[ \t]*\$?(-?[0-9.,]+)")


def final_answer(text: str) -> Decimal | None:
    """Return the number after the last `####` that one follows; None if there is none.

    It is a Decimal, so that "42", "42." and "42.0" are one answer.
    """
    start = text.rfind("####")
    while start != -1:
        if match := _ANSWER.match(text, start):
            return number(match[1].rstrip(",."))
        start = text.rfind("####", 0, start + 3)
    return None
