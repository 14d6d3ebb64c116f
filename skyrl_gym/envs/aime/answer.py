"""The answer in a reply to a competition problem: how it is found, and its normal form."""

from __future__ import annotations

import re

from skyrl_gym.envs.aime.latex import argument, commands, unwrapped

_LOOK_AT = 300  # characters at the end of a reply
_ANSWER = re.compile(r"answer[*_ \t]*:\s*([^\n<]*)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
_WORDS = re.compile(
    r"\b(?:(?:an?|the)\s+(?=[\w\\])|(?:square|degrees?|dollars?|cents?|percent|units?|points?|meters?|metres?|centimeters?|feet|inch(?:es)?"
    r"|miles?|minutes?|hours?|seconds?|days?|years?|cm|mph)\b)",
    re.IGNORECASE,
)
_DECORATION = re.compile(
    r"\$|\*\*|\\(?:left|right|displaystyle|limits|circ|degree|dots|[Bb]igg?[lr]?)(?![a-zA-Z])|\\[!,;: %()\[\]]"
    r"|\^\{?\\circ\}?|%|°"
)
_WRAPPERS = ("text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mathit", "mbox", "boxed", "fbox", "overline")


def last_answer(reply: str) -> str | None:
    """Return what stands behind the last "Answer:" near the end, up to the end of its line or a "<"."""
    last = None
    for match in _ANSWER.finditer(reply[-_LOOK_AT:]):
        last = match[1].strip()
    return last


def normal_form(answer: str) -> str:
    r"""Return the value that is meant, in one spelling: "x = \boxed{1,024} units" and "$1024$" are both "1024"."""
    text = _last_boxed(answer)
    text = _DECORATION.sub(" ", text.rsplit("=", 1)[-1])
    text = unwrapped(text, _WRAPPERS)
    text = _WORDS.sub(" ", text)
    text = commands(_THOUSANDS.sub("", text))
    return re.sub(r"\s", "", text).rstrip(".")


def _last_boxed(answer: str) -> str:
    r"""Return the contents of the last \boxed{...}, or the whole answer if there is none that is closed."""
    start = answer.rfind(r"\boxed")
    while start != -1:
        boxed = argument(answer, start + len(r"\boxed"))
        if boxed is not None:
            return boxed[0]
        start = answer.rfind(r"\boxed", 0, start)
    return answer
