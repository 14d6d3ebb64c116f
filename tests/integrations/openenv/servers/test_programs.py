from __future__ import annotations

from typing import Any

import pytest

from integrations.openenv.servers.programs import MAX_OUTPUT_CHARS, ProgramOutcome, capped, checked_outcome


def test_an_honest_answer_is_an_outcome() -> None:
    answer = {"stdout": "3\n", "stderr": "", "exit_code": 0}
    assert checked_outcome(answer) == ProgramOutcome("3\n", "", 0)
    assert checked_outcome({**answer, "stdout": capped("x" * 200_000)}) is not None
    assert capped("x" * 200_000).endswith("(200000 characters)")


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        7,
        {},
        {"stdout": 7, "stderr": "", "exit_code": 0},
        {"stdout": "", "stderr": "", "exit_code": 2},
        {"stdout": "", "stderr": "", "exit_code": "0"},
        {"stdout": "x" * (2 * MAX_OUTPUT_CHARS), "stderr": "", "exit_code": 0},
    ],
    ids=lambda answer: str(answer)[:40],
)
def test_what_no_honest_worker_says_is_none(answer: Any) -> None:
    assert checked_outcome(answer) is None


def test_a_lone_surrogate_does_not_reach_the_socket() -> None:
    outcome = checked_outcome({"stdout": "\ud800", "stderr": "", "exit_code": 0})
    assert outcome == ProgramOutcome("?", "", 0)
