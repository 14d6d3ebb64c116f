"""The answer in a reply to a competition problem: how it is found, and its normal form."""

from __future__ import annotations

import re

from skyrl_gym.envs.aime.latex import argument, commands, unwrapped, without_repetition

_LOOK_AT = 300  # characters at the end of a reply
_ANSWER = re.compile(r"answer[*_ \t]*:\s*([^\n<]*)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\s)(?=\d{3}(?!\d))")
_WORDS = re.compile(
    r"\b(?:(?:an?|the)\s+(?=[\w\\])|(?:square|degrees?|dollars?|cents?|percent|units?|points?|meters?|metres?|centimeters?|feet|inch(?:es)?"
    r"|miles?|minutes?|hours?|seconds?|days?|years?|[cmk]m|mph)\b(?:\s*\^\s*(?:\d|\{\d\}))?)",
    re.IGNORECASE,
)
_DECORATION = re.compile(
    r"\\?\$|`|\*\*|\\(?:q?quad|left|right|displaystyle|limits|circ|degree|dots|[Bb]igg?[lr]?)(?![a-zA-Z])"
    r"|(?<!\\)\\[!,;: %()\[\]]|\^\{?\\circ\}?|%|°"
)
_WRAPPERS = (
    "text", "textbf", "textit", "textrm", "textsf", "texttt", "mathrm", "mathbf", "mathit", "mathsf", "mathtt",
    "boldsymbol", "bm", "operatorname", "mbox", "boxed", "fbox", "overline", "underline",
)  # fmt: skip
_NOT_BETWEEN_DIGITS = re.compile(r"(?<!\d)\s|\s(?!\d)")  # "20 4" is not 204


def last_answer(reply: str) -> str | None:
    """Return what stands behind the last "Answer:" near the end, up to the end of its line or a "<"."""
    last = None
    for match in _ANSWER.finditer(reply[-_LOOK_AT:]):
        last = match[1].strip()
    return last


def normal_form(answer: str) -> str:
    r"""Return the value that is meant, in one spelling: "x = \boxed{1,024} units" and "$1024$" are both "1024"."""
    text = _last_boxed(answer)
    text = _DECORATION.sub(" ", text.rsplit("=", 1)[-1]).strip("*_ ")
    text = unwrapped(without_repetition(text), _WRAPPERS)
    text = " ".join(_WORDS.sub(" ", text).split())
    text = commands(_THOUSANDS.sub("", text))
    return _NOT_BETWEEN_DIGITS.sub("", text).rstrip(".\\")


def _last_boxed(answer: str) -> str:
    r"""Return what the last \boxed{...}, or \boxed without braces, holds; the whole answer if there is none closed."""
    start = answer.rfind(r"\boxed")
    while start != -1:
        rest = answer[start + len(r"\boxed") :].lstrip()
        boxed = argument(rest, 0)
        if boxed is not None:
            return boxed[0] if rest.startswith("{") else rest.split("$")[0]
        start = answer.rfind(r"\boxed", 0, start)
    return answer
