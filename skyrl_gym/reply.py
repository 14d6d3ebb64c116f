"""Functions that find tags, numbers and code blocks in a model's reply. Each takes time linear in the reply's length.

A reply may be any string. Tags are found with str.find, not with a regular expression: `<a>(.*?)</a>` on a megabyte of
"<a>" takes hours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

_NUMBER = re.compile(r"(?:(?<![0-9.,])-)?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)")
_MAX_DIGITS = 100  # a longer number is not an answer to anything here


def printable(text: str) -> str:
    """Return the text with lone surrogates replaced, so that UTF-8 can encode it (for a tokenizer, file or server)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def tagged(text: str, tag: str) -> Iterator[str]:
    """Yield the contents of each `<tag>…</tag>`, in order, from the first opening: "<a>1<a>2</a>" gives "1<a>2"."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.find(opening)
    while start != -1:
        start += len(opening)
        end = text.find(closing, start)
        if end == -1:
            return
        yield text[start:end]
        start = text.find(opening, end + len(closing))


def first_tagged(text: str, tag: str) -> str | None:
    return next(tagged(text, tag), None)


def last_tagged(text: str, tag: str) -> str | None:
    """Return the contents of the last `<tag>…</tag>`, from the nearest opening: "<a>1<a>2</a>" gives "2"."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start == -1 else text[start + len(tag) + 2 : end]


def up_to_first_close(text: str, *tags: str) -> str:
    """Return the text up to and with the first `</tag>` of any of these tags, as if generation had stopped there."""
    ends = [position + len(tag) + 3 for tag in tags if (position := text.find(f"</{tag}>")) != -1]
    return text[: min(ends)] if ends else text


def number(text: str) -> Decimal | None:
    """Return the value of a text that is a number and nothing else: "1,042", "42.", " -3.50 ", ".5"; else None."""
    text = text.strip()
    return _value(text) if len(text) <= _MAX_DIGITS and _NUMBER.fullmatch(text) else None


def last_number(text: str) -> Decimal | None:
    """Return the value of the last number in the text. A minus after a digit is an operator: "45-3" ends in 3."""
    end = max(text.rfind(digit) for digit in "0123456789")
    if end == -1:
        return None
    last = ""
    for match in _NUMBER.finditer(text, max(0, end - 2 * _MAX_DIGITS), end + 2):
        last = match[0]
    return _value(last) if len(last) <= _MAX_DIGITS else None


def last_fenced_code(text: str) -> str | None:
    """Return the contents of the last closed ``` block, without the language name after its opening fence."""
    blocks = text.split("```")[1::2]
    if text.count("```") % 2:
        blocks = blocks[:-1]  # opened and never closed
    if not blocks:
        return None
    first_line, newline, rest = blocks[-1].partition("\n")
    return rest if newline and re.fullmatch(r"[\w+-]*\s*", first_line) else blocks[-1]


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))
