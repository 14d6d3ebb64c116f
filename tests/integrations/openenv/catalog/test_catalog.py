from __future__ import annotations

from random import Random

import pytest

from integrations.openenv.catalog import InvalidAction, catalog_entry
from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.catalog.options import NoOptions

ECHO, CODING = EchoEntry(), CodingEntry()


def echoed(text: str) -> dict[str, object]:
    return {"tool_name": "echo_message", "result": {"data": text}, "error": None}


def printed(stdout: str, exit_code: int = 0) -> dict[str, object]:
    return {"stdout": stdout, "stderr": "", "exit_code": exit_code}


def test_names_may_have_dashes() -> None:
    assert catalog_entry("echo-env") is catalog_entry("echo_env")


def test_other_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown env_name='chess' \(known: echo_env, coding_env"):
        catalog_entry("chess")


@pytest.mark.parametrize("entry", [ECHO, CODING], ids=lambda entry: entry.name)
def test_tasks_are_repeatable_and_different(entry) -> None:
    tasks = entry.tasks(Random(5), 100, entry.read_options({}))
    assert tasks == entry.tasks(Random(5), 100, entry.read_options({}))
    assert len({task.prompt[-1]["content"] for task in tasks}) == 100


def test_more_tasks_than_there_are_is_an_error_not_an_endless_search() -> None:
    with pytest.raises(ValueError, match="coding_env: 9000 different tasks are too many"):
        CODING.tasks(Random(5), 9000, NoOptions())


def test_echo_pays_by_likeness_and_in_full_only_for_equality() -> None:
    assert ECHO.score("red lamp tree", echoed("red lamp tree")) == 1.0
    assert ECHO.score("red lamp tree", echoed("red lamp")) == pytest.approx(2 * 8 / (13 + 8))  # 8 characters in common
    assert ECHO.score("red lamp tree", echoed("red lamp tree.")) < 1.0
    assert ECHO.score("red lamp tree", echoed("red lamp tree" + " x" * 1000)) < 0.02
    assert ECHO.score("red lamp tree", {}) == 0.0
    assert ECHO.score("red lamp tree", {"echoed_message": "red lamp tree"}) == 1.0


def test_coding_pays_a_little_for_running_and_in_full_only_for_the_right_output() -> None:
    assert CODING.score("20", printed("20\n")) == 1.0
    assert CODING.score("20", printed("", exit_code=1)) == 0.1
    assert CODING.score("20", printed("")) == 0.2
    assert CODING.score("20", printed("21")) == pytest.approx(0.4)  # 0.2 + 0.4 * 2*1/4
    assert CODING.score("20", printed("20\n20\n")) < 0.6


@pytest.mark.parametrize(
    "text", ["print(1)", "\nprint(1)\n", "```python\nprint(1)\n```", "```\nprint(1)```", "  ```py\nprint(1)\n```  "]
)
def test_code_may_stand_in_a_fence(text: str) -> None:
    assert CODING.parse(text) == {"code": "print(1)"}


@pytest.mark.parametrize("entry", [ECHO, CODING], ids=lambda entry: entry.name)
def test_an_empty_action_is_explained(entry) -> None:
    with pytest.raises(InvalidAction, match="empty"):
        entry.parse(" \n ")


def test_a_failed_program_shows_the_end_of_its_error() -> None:
    text = CODING.observation_text({"stdout": "", "stderr": "x" * 5000 + "ZeroDivisionError", "exit_code": 1})
    assert text.endswith("ZeroDivisionError")
    assert len(text) < 1100
