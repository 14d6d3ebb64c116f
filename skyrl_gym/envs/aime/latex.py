r"""LaTeX as models write answers in it: commands with arguments in balanced braces, in one spelling."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_FRACTIONS = {"frac", "dfrac", "tfrac", "cfrac"}
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")  # "2 1/2"
_ONE_SPELLING = {
    "−": "-", "–": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
}  # fmt: skip
_REPEATED = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")  # 0.1\overline{6}
_ROOT_OF = re.compile(r"√\s*\(([^()]*)\)")
_EXPONENT = re.compile(r"\^\s*([0-9]+|[a-zA-Z])")
_SYNONYMS = {"times": "cdot", "leq": "le", "geq": "ge", "ne": "neq", "lbrace": "{", "rbrace": "}"}


def argument(text: str, start: int) -> tuple[str, int] | None:
    r"""Return the argument that begins at `start` and where it ends: "{a{b}}" is a{b}, "\pi x" is \pi, "12" is 1.

    None where nothing follows, or a brace never closes.
    """
    while start < len(text) and text[start].isspace():
        start += 1
    if start == len(text) or text[start] == "}":
        return None
    if text[start] == "\\" and (command := _COMMAND.match(text, start)):
        return command[0], command.end()
    if text[start] != "{":
        return text[start], start + 1
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position], position + 1
    return None


def unwrapped(text: str, wrappers: Sequence[str]) -> str:
    r"""Return the text with "\text{...}" and the like replaced by what they hold, between spaces."""
    while True:
        for command in reversed(list(_COMMAND.finditer(text))):  # from the inside out
            if command[1] in wrappers and text[command.end() : command.end() + 1] == "{":
                held = argument(text, command.end())
                if held is not None:
                    text = f"{text[: command.start()]} {held[0]} {text[held[1] :]}"
                    break
        else:
            return text


def without_repetition(text: str) -> str:
    r"""Return the text with "0.1\overline{6}" as the fraction that it is, \frac{15}{90}."""

    def fraction(found: re.Match[str]) -> str:
        whole, once, again = found[1], found[2], found[3] or found[4]
        numerator = int(whole + once + again) - int(whole + once or "0")
        return rf"(\frac{{{numerator}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}})"

    return _REPEATED.sub(fraction, text)


def commands(text: str) -> str:
    r"""Return the text with one spelling of each command: "\dfrac12" is "\frac{1}{2}", "\sqrt 2" is "\sqrt{2}"."""
    text = _ROOT_OF.sub(r"\\sqrt{\1}", text)
    for symbol, spelling in _ONE_SPELLING.items():
        text = text.replace(symbol, spelling)
    text = _EXPONENT.sub(r"^{\1}", unicodedata.normalize("NFKC", text))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    parts, position = [], 0
    while command := _COMMAND.search(text, position):
        parts.append(text[position : command.start()])
        name, position = command[1], command.end()
        if name in _FRACTIONS:
            written, position = _with_arguments(text, position, "frac", 2)
        elif name == "sqrt":
            root, position = _root_index(text, position)
            written, position = _with_arguments(text, position, f"sqrt{root}", 1)
        else:
            written = f"\\{_SYNONYMS.get(name, name)}"
        parts.append(written)
    return "".join([*parts, text[position:]])


def _with_arguments(text: str, position: int, name: str, num_arguments: int) -> tuple[str, int]:
    written = f"\\{name}"
    for _ in range(num_arguments):
        found = argument(text, position)
        if found is None:
            break
        # An argument is shorter than the text that holds it, and an answer has a few hundred characters at most.
        written, position = f"{written}{{{commands(found[0])}}}", found[1]
    return written, position


def _root_index(text: str, position: int) -> tuple[str, int]:
    r"""Return "[3]" of "\sqrt[3]{8}"; nothing for a square root."""
    index = re.compile(r"\s*\[([^\[\]]*)\]").match(text, position)
    if index is None:
        return "", position
    return ("" if index[1].strip() == "2" else f"[{index[1].strip()}]"), index.end()
