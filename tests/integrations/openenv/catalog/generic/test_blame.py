"""Errors of a server that somebody else wrote: its own, or the action's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from integrations.openenv.catalog.generic.blame import caused_by_action
from integrations.openenv.client.errors import ServerError
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv, close_background_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.core import EnvFailure
from tests.integrations.openenv.troubled import NAME

CONFIG = OpenEnvConfig(startup_timeout_s=200.0, trust_dataset_code=True)


EXCEPTIONS = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError, TypeError)


def raised_by(program: str) -> str:
    """Return what a server sends of the exception that the program raises: its message."""
    with pytest.raises((*EXCEPTIONS, ValueError)) as raised:
        exec(program, {})
    return str(raised.value)


def is_actions(words: str, **sent: Any) -> bool:
    return caused_by_action(ServerError("EXECUTION_ERROR", words, []), sent or {"move": "left"}, {"move"})


@pytest.mark.parametrize(
    "program",
    [
        "object().step",
        "None.reset",
        "import json; json.model_dump",
        "undefined",
        "def f():\n  x += 1\nf()",
        "import no_such_package",
        "from json import no_such_name",
        "import json; json.dumps({1, 2})",
        "import json; json.dumps({'a': object()})",
        "def f(): return f()\nf()",
        "open('/no/such/file')",
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "x = None; x[0]",
        "x = None; x()",
        "for x in None: pass",
        "1 + '1'",
        "'1' + 1",
        "-'a'",
        "1 < 'a'",
        "(lambda a: a)()",
        "(lambda: 0)(1)",
        "(lambda a: a)(1, b=2)",
        "(lambda a: a)(1, a=2)",
        "range('3')",
        "x = [1]; x['a']",
        "'a'[0] = 1",
        "a, b = (1,)",
        "a, b = 1, 2, 3",
        "a, b = 1",
        "{[]: 1}",
        "1 in 2",
        "open({})",
        "{}['dataset']",
        "[][0]",
        "1 / 0",
        "raise RuntimeError('Environment not initialized. Call reset() first.')",
    ],
)
def test_a_programming_error_is_the_servers(program: str) -> None:
    words = raised_by(program)
    assert not is_actions(words), words


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        ("Illegal move: e9e9", {"move": "e9e9"}),
        ("invalid literal for int() with base 10: 'left'", {"move": "left"}),
        ("could not convert string to float: 'left'", {"move": "left"}),
        ("Cell (2, 2) is not empty", {"row": 2, "column": 2}),
        ("Invalid action 7; legal: 0 to 6", {"move": 7}),
        ("", {"move": "x"}),
        ("'jump'", {"move": "jump"}),  # a key that the action names
        ("'Jump'", {"move": "jump"}),
        ("12", {"column": 12}),
        ("list index out of range", {"column": 12}),
        ("index 9 is out of bounds for axis 0 with size 9", {"cell": 9}),
        ("division by zero", {"sum": "1 / 0"}),
        ("'str' object has no attribute 'get'", {"plan": [{"a": "b"}, "c"]}),  # of a form that no schema says
    ],
)
def test_a_complaint_about_the_action_is_the_policys(words: str, sent: dict[str, Any]) -> None:
    assert is_actions(words, **sent)


@pytest.mark.parametrize(
    ("complaint", "is_the_actions"),
    [
        ({"loc": ["move"], "type": "string_type", "input": 3}, True),
        ({"loc": ["move"], "type": "string_type", "input": None}, False),  # a value that was not sent
        ({"loc": ["size"], "type": "missing", "input": {"move": 3}}, True),
        ({"loc": ["board"], "type": "list_type", "input": None}, False),
        ({"loc": ["horn"], "type": "extra_forbidden", "input": 1}, True),
        ({"loc": [], "type": "value_error", "msg": "only one of"}, True),
        ({"loc": ["plan", 0, "x"], "type": "int_type", "input": "a"}, True),
    ],
)
def test_a_complaint_about_what_was_not_sent_is_the_servers(complaint: dict[str, Any], is_the_actions: bool) -> None:
    error = ServerError("VALIDATION_ERROR", "Invalid message", [complaint])
    sent = {"move": 3, "horn": 1, "plan": [{"x": "a"}]}
    assert caused_by_action(error, sent, {"move", "size", "plan"}) is is_the_actions
    assert caused_by_action(ServerError("VALIDATION_ERROR", "", []), sent, {"move"})
    assert not caused_by_action(ServerError("UNKNOWN_TYPE", "step?", []), sent, {"move"})


# Through a real server


@pytest.fixture(scope="module", autouse=True)
def no_server_left() -> Iterator[None]:
    yield
    close_background_pools()


def step(word: str, **variables: str) -> dict[str, Any]:
    [row], _ = dataset_rows(NAME, 1, 0, 0, {"variables": variables}, CONFIG)
    with OpenEnv(CONFIG, {**row, "max_turns": 2}) as env:
        env.init(row["prompt"])
        return {**env.step(f"<action>{word}</action>"), "invalid": env.get_metrics()["invalid_actions"]}


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("bug", "EXECUTION_ERROR: 'dict' object has no attribute 'model_dump'"),
        ("answer of a wrong type", "text.*Input should be a valid string"),
        ("missing key", "EXECUTION_ERROR: [0-9]"),
    ],
)
def test_a_servers_own_crash_is_the_environments_failure_in_its_words(word: str, words: str) -> None:
    with pytest.raises(EnvFailure, match=words):
        step(word)


@pytest.mark.parametrize("word", ["illegal", "unknown key"])
def test_what_a_server_says_of_an_action_is_told_to_the_policy(word: str) -> None:
    said = step(word)
    assert said["invalid"] == 1
    assert word in said["observations"][0]["content"]


def test_why_a_server_makes_no_environment_is_read_from_its_log() -> None:
    with pytest.raises(Exception, match=r"FACTORY_ERROR.*FileNotFoundError: /app/env/data/questions\.csv is not there"):
        step("0", TROUBLE="factory")


def test_a_server_that_needs_a_seed_can_be_described() -> None:
    assert step("9", TROUBLE="seed")["observations"][0]["content"] == "Wrong."
