r"""The number that an answer in normal form stands for, so that 1/2, 0.5 and \frac{1}{2} are one answer.

sum      product { (+|-) product }
product  power { (* | / | \cdot | nothing) power }      2\sqrt{3}, but 2\frac{1}{2} is two and a half
power    atom [ ! ] [ ^ atom ]                           -2^2 is -4
atom     number, \pi, \frac{}{}, \binom{}{}, \sqrt{}, \sqrt[n]{}, (), {}

A whole expression may be "a \over b", and a number may have an exponent: 3e2.
"""

from __future__ import annotations

import math
import re
from decimal import Context, Decimal, DecimalException, DivisionByZero, InvalidOperation, Overflow, localcontext
from functools import cache

from skyrl_gym.envs.aime.latex import argument

_DIGITS = 400  # more than an answer has characters, so two numbers that differ in writing never compare equal
_SAME_DIGITS = 350
_MAX_EXPONENT, _MAX_DEPTH, _MAX_CHARACTERS = 1000, 40, 400
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?")
_OVER = re.compile(r"\\over(?![a-zA-Z])")
_LARGEST_FACTORIAL = 300
_TIMES = re.compile(r"\*|/|\\cdot(?![a-zA-Z])|\\div(?![a-zA-Z])")
_ROOT = re.compile(r"\\sqrt(?:\[([0-9]{1,3})\])?(?=\{)")
_INTEGER = re.compile(r"[0-9]{1,100}")
_BRACKETS = {"(": ")", "[": "]"}


class _NoNumber(ValueError):
    """The text is not a number that this reader can compute."""


def same_value(prediction: str, truth: str) -> bool:
    """Return whether two answers in normal form are one number, or lists of equal numbers in equal brackets."""
    if prediction == truth:
        return True
    if truth.startswith(r"\{") and truth.endswith(r"\}"):
        return _same_set(prediction, truth)
    ours, theirs = _elements(prediction), _elements(truth)
    if len(ours) > 1 or len(theirs) > 1:
        alike = (prediction[:1], prediction[-1:]) == (truth[:1], truth[-1:]) or truth[:1] not in _BRACKETS
        return alike and len(ours) == len(theirs) and all(map(same_value, ours, theirs))
    mine, other = value(prediction), value(truth)
    if mine is None or other is None:
        return False
    with localcontext(_context()):
        return abs(mine - other) <= abs(other).scaleb(-_SAME_DIGITS)


def _same_set(prediction: str, truth: str) -> bool:
    r"""Return whether "{1,2}" or "\{2,1\}" has the elements of the set `truth`, in any order."""
    ours = re.fullmatch(r"\\?\{(.*?)\\?\}", prediction)
    if ours is None or len(prediction) > _MAX_CHARACTERS:
        return False
    left = _elements(ours[1])
    for element in _elements(truth[2:-2]):
        found = next((i for i, mine in enumerate(left) if same_value(mine, element)), None)
        if found is None:
            return False
        del left[found]
    return not left


def value(text: str) -> Decimal | None:
    """Return the number, to 400 digits; None if the text is something else."""
    if not text or len(text) > _MAX_CHARACTERS:
        return None
    try:
        with localcontext(_context()):
            result = _AnswerReader(text, 0).whole()
            return result if result.is_finite() else None  # 0^{-1} is Decimal's infinity
    except (_NoNumber, DecimalException):
        return None


def _context() -> Context:
    return Context(prec=_DIGITS, traps=[InvalidOperation, DivisionByZero, Overflow])


class _AnswerReader:
    """Recursive-descent parser of one expression. `depth`: how many braces and parentheses surround it."""

    def __init__(self, text: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise _NoNumber("too deep")
        self._text = text
        self._at = 0
        self._depth = depth

    def whole(self) -> Decimal:
        result = self._sum()
        if over := _OVER.match(self._text, self._at):
            self._at = over.end()
            result /= self._sum()
        if self._at != len(self._text):
            raise _NoNumber(self._text[self._at :])
        return result

    def _sum(self) -> Decimal:
        result = self._product(self._sign())
        while self._next() in ("+", "-"):
            result += self._product(self._sign())
        return result

    def _sign(self) -> int:
        """Read one sign, if there is one."""
        is_negative = self._takes("-")
        if not is_negative:
            self._takes("+")
        return -1 if is_negative else 1

    def _product(self, sign: int) -> Decimal:
        start = self._at
        result = sign * self._power()
        if _INTEGER.fullmatch(self._text, start, self._at) and (part := self._proper_fraction()) is not None:
            result += sign * part
        while self._next() not in ("", "+", "-", ")", "]") and not _OVER.match(self._text, self._at):
            times = _TIMES.match(self._text, self._at)
            if times is None:
                if self._next().isdigit() or self._next() == ".":
                    raise _NoNumber("two numbers in a row")
                result *= self._power()
                continue
            self._at = times.end()
            factor = self._sign() * self._power()
            result = result / factor if times[0] in ("/", r"\div") else result * factor
        return result

    def _proper_fraction(self) -> Decimal | None:
        r"""Read the proper fraction of a mixed number, such as \frac{1}{2}, if one follows; else return None."""
        if not self._text.startswith(r"\frac", self._at):
            return None
        upper, lower, end = self._two_arguments(self._at + len(r"\frac"))
        if not (_INTEGER.fullmatch(upper) and _INTEGER.fullmatch(lower) and int(upper) < int(lower)):
            return None
        self._at = end
        return Decimal(upper) / Decimal(lower)

    def _power(self) -> Decimal:
        base = self._atom()
        if self._takes("!"):
            base = Decimal(math.factorial(_natural(base)))
        if not self._takes("^"):
            return base
        exponent = self._argument() if self._next() == "{" else self._atom()
        if abs(exponent) > _MAX_EXPONENT:
            raise _NoNumber("a power too large to be an answer")
        return base**exponent

    def _atom(self) -> Decimal:
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            return Decimal(number[0])
        if self._takes(r"\pi"):
            return _pi()
        if self._takes(r"\frac"):
            upper, lower, self._at = self._two_arguments(self._at)
            return self._inner(upper) / self._inner(lower)
        if self._takes(r"\binom"):
            upper, lower, self._at = self._two_arguments(self._at)
            return Decimal(math.comb(_natural(self._inner(upper)), _natural(self._inner(lower))))
        if root := _ROOT.match(self._text, self._at):
            self._at = root.end()
            return _root(self._argument(), int(root[1] or 2))
        if self._next() == "{":
            return self._argument()
        if self._takes("("):
            if self._depth == _MAX_DEPTH:
                raise _NoNumber("too deep")
            self._depth += 1
            result = self._sum()
            self._depth -= 1
            if self._takes(")"):
                return result
        raise _NoNumber(self._text[self._at :])

    def _argument(self) -> Decimal:
        held = argument(self._text, self._at)
        if held is None:
            raise _NoNumber("a brace that does not close")
        self._at = held[1]
        return self._inner(held[0])

    def _two_arguments(self, at: int) -> tuple[str, str, int]:
        upper = argument(self._text, at)
        lower = argument(self._text, upper[1]) if upper else None
        if upper is None or lower is None:
            raise _NoNumber("half a fraction")
        return upper[0], lower[0], lower[1]

    def _inner(self, text: str) -> Decimal:
        return _AnswerReader(text, self._depth + 1).whole()

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _takes(self, word: str) -> bool:
        found = self._text.startswith(word, self._at)
        self._at += len(word) if found else 0
        return found


def _natural(number: Decimal) -> int:
    if number != number.to_integral_value() or not 0 <= number <= _LARGEST_FACTORIAL:
        raise _NoNumber("no small natural number")
    return int(number)


def _root(radicand: Decimal, index: int) -> Decimal:
    if index == 0:
        raise _NoNumber("the root with index 0")
    if index == 2:
        return radicand.sqrt()
    if radicand < 0 and index % 2:
        return -_root(-radicand, index)
    return radicand if radicand == 0 else radicand ** (1 / Decimal(index))


@cache
def _pi() -> Decimal:
    """Return pi to 400 digits by Machin's formula: pi = 16 arctan(1/5) - 4 arctan(1/239)."""
    unit = 10 ** (_DIGITS + 10)

    def arctan_of_inverse(x: int) -> int:
        term = total = unit // x
        divisor = 1
        while term:
            term //= -x * x
            divisor += 2
            total += term // divisor
        return total

    return +(Decimal(16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)) / unit)


def _elements(text: str) -> list[str]:
    """Return the parts of "(a,b)", "[a,b]" or "a,b" between the outer commas."""
    if text[:1] in _BRACKETS and text[-1:] in (")", "]"):
        text = text[1:-1]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]
