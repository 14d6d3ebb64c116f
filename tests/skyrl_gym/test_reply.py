import time
from decimal import Decimal

import pytest

from skyrl_gym.reply import (
    first_tagged,
    last_fenced_code,
    last_number,
    last_tagged,
    number,
    printable,
    tagged,
    up_to_first_close,
)


@pytest.mark.parametrize(
    ("text", "all_of_them", "last"),
    [
        ("<a>1</a><a>2\n3</a>", ["1", "2\n3"], "2\n3"),
        ("<a>1<a>2</a>", ["1<a>2"], "2"),
        ("<a>1</a><a>", ["1"], "1"),
        ("</a><a>", [], None),
        ("<a>", [], None),
        ("", [], None),
        ("<a></a>", [""], ""),
    ],
)
def test_tags_are_found_wherever_they_close(text, all_of_them, last):
    assert list(tagged(text, "a")) == all_of_them
    assert first_tagged(text, "a") == (all_of_them[0] if all_of_them else None)
    assert last_tagged(text, "a") == last


def test_a_reply_ends_where_a_stop_string_would_have_ended_it():
    assert up_to_first_close("x</b>y</a>z", "a", "b") == "x</b>"
    assert up_to_first_close("x</c>", "a", "b") == "x</c>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        (" 42. ", 42),
        ("42.0", 42),
        ("1,042", 1042),
        ("-3.50", Decimal("-3.5")),
        (".5", Decimal("0.5")),
        ("", None),
        (".", None),
        ("4 2", None),
        ("1e5", None),
        ("٤٢", None),
        ("nan", None),
        ("9" * 101, None),
    ],
)
def test_a_number_is_compared_by_value(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("17 + 25 = 42.", 42),
        ("it is -7", -7),
        ("45-3", 3),
        ("none", None),
        ("1,042 apples", 1042),
        ("5\n-6\n", -6),
        ("7 " + "x" * 500, 7),
        ("1" * 101, None),
        ("2 " + "1" * 500, None),
        ("3.", 3),
        ("0.5%", Decimal("0.5")),
    ],
)
def test_the_last_number_of_a_text_counts(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a\n```python\nprint(1)\n```\nb", "print(1)\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\n1\n``` ```py\n2\n```", "2\n"),
        ("```py\n1\n``` ```py\n2\n", "1\n"),
        ("```x = 1```", "x = 1"),
        ("``` ```", " "),
        ("```", None),
        ("no code", None),
    ],
)
def test_the_last_closed_code_block_counts(text, code):
    assert last_fenced_code(text) == code


def test_printable_text_can_be_encoded():
    assert printable("a\ud800b é 🏴") == "a?b é 🏴"


@pytest.mark.parametrize("piece", ["<a>", "</a>", "</a><a>", "<a></a>", "```", "#", "1", "1,", "-", ".", " ", "```a\n"])
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    for _ in tagged(text, "a"):
        pass
    for read in (number, last_number, last_fenced_code, printable):
        read(text)
    last_tagged(text, "a")
    up_to_first_close(text, "a", "b")
    assert time.perf_counter() - start < 60  # linear: under 0.5 s; quadratic: hours
