"""Grading of a program by tests. Each test runs in its own process, which never sees the expected output."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from skyrl_gym.tools.python_process import run_python

_MAX_OUTPUT = 4_000_000  # characters; no right answer is longer
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_RESULT_MARK = "\n--result--\n"

# The benchmark's programs use these names without importing them.
_BEFORE = (
    "from typing import *; from collections import *; from itertools import *; from functools import *; "
    "import bisect, collections, functools, heapq, itertools, math, random, re, string, sys\n"
)
# Call the function (of class Solution, if there is one) with the arguments, one JSON value a line.
_CALL = """
import json as _json, sys as _sys
_owner = Solution() if "Solution" in globals() else None
_function = getattr(_owner, {name!r}) if _owner is not None else globals()[{name!r}]
_result = _function(*[_json.loads(_line) for _line in {arguments!r}.split("\\n") if _line.strip()])
_sys.stdout.write({mark!r} + _json.dumps(_result))
"""


@dataclass(frozen=True, slots=True)
class ProgramTest:
    input: str
    output: str
    func_name: str | None  # None: standard input and output; else a function's JSON arguments and result

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ProgramTest:
        """Read a row {input, output, testtype: "stdin" or "functional", metadata: {func_name}}."""
        functional = row.get("testtype") == "functional"
        name = (row.get("metadata") or {}).get("func_name") if functional else None
        if functional and not name:
            raise ValueError(f"a functional test needs metadata.func_name: {row!r}")
        return cls(str(row["input"]), str(row["output"]), name)


def passes(code: str, test: ProgramTest, *, timeout_s: float) -> bool:
    program, stdin = _BEFORE + code, test.input
    if test.func_name is not None:
        program += _CALL.format(name=test.func_name, arguments=test.input, mark=_RESULT_MARK)
        stdin = ""
    result = run_python(program, stdin=stdin, timeout_s=timeout_s, max_output=_MAX_OUTPUT)
    if result.exit_code != 0:
        return False
    if test.func_name is None:
        return same_output(result.stdout, test.output)
    return _same_json(result.stdout.rpartition(_RESULT_MARK)[2], test.output)


def same_output(printed: str, expected: str) -> bool:
    """Return whether two outputs have the same lines of the same words; numbers are compared by value."""
    ours, theirs = ([line.split() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(
        len(mine) == len(other) and all(map(_same_word, mine, other)) for mine, other in zip(ours, theirs, strict=True)
    )


def _same_word(mine: str, other: str) -> bool:
    if mine == other:
        return True
    if not (_NUMBER.fullmatch(mine) and _NUMBER.fullmatch(other)):  # Decimal also reads "1_0", "NaN" and other digits
        return False
    try:
        return Decimal(mine) == Decimal(other)
    except InvalidOperation:  # an exponent that is too large
        return False


def _same_json(mine: str, other: str) -> bool:
    try:
        ours, theirs = (json.loads(text, parse_int=Decimal, parse_float=Decimal) for text in (mine, other))
        return _same_value(ours, theirs)
    except (ValueError, RecursionError, InvalidOperation):  # no JSON, or an exponent that is too large
        return False


def _same_value(mine: Any, other: Any) -> bool:
    """Return whether two JSON values are equal: 1 equals 1.0, but not true (which it does in Python)."""
    if isinstance(mine, list) and isinstance(other, list):
        return len(mine) == len(other) and all(map(_same_value, mine, other))
    if isinstance(mine, dict) and isinstance(other, dict):
        return mine.keys() == other.keys() and all(_same_value(mine[key], other[key]) for key in mine)
    return isinstance(mine, bool) == isinstance(other, bool) and mine == other
