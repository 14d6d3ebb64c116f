import time

import pytest

from skyrl_gym.core import EnvFailure
from skyrl_gym.tools import SQLCodeExecutorToolGroup
from skyrl_gym.tools.sql import QueryError, QueryTimeout, ResultSet, database_path, query

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def folder(sql_root):
    return sql_root / "spider" / "database"


@pytest.fixture
def database(folder):
    return database_path(folder, "example")


@pytest.fixture
def sql(folder):
    return SQLCodeExecutorToolGroup(str(folder)).sql


def test_a_result_is_shown_as_a_table_with_the_turns_left(sql):
    answer = sql("example", "SELECT name, age FROM pets WHERE age < 4", 3)
    assert answer == ("<observation>\nname | age\nRex | 3\n<reminder>You have 3 turns left.</reminder>\n</observation>")


def test_no_query_wrong_query_and_slow_query_are_told_apart(sql):
    assert "previous action is invalid" in sql("example", None, 2)
    assert "SQL error: no such column: size" in sql("example", "SELECT size FROM pets", 2)
    start = time.perf_counter()
    assert f"SQL Timeout:\n{ENDLESS}" in sql("example", ENDLESS, 2, timeout=0.2)
    assert time.perf_counter() - start < 60  # it would take hours


def test_a_table_over_9000_characters_is_cut_to_50_rows(sql):
    many = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < {}) SELECT x, 'some words' FROM n"
    answer = sql("example", many.format(2000), 1)
    assert "50 | some words\nTruncated to the first 50 of 2000 rows" in answer
    assert "51 | " not in answer
    assert "100 | some words" in sql("example", many.format(100), 1)
    assert "of at least 10000 rows" in sql("example", many.format(10**9), 1)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM pets",
        "INSERT INTO pets VALUES ('x', 1)",
        "UPDATE pets SET age = 0",
        "DROP TABLE pets",
        "CREATE TEMP TABLE t (x)",
        "ATTACH 'other.sqlite' AS other",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "VACUUM INTO 'copy.sqlite'",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT 1; DELETE FROM pets",
    ],
)
def test_nothing_but_reading_is_possible(database, statement, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = database.read_bytes()
    with pytest.raises(QueryError):
        query(database, statement)
    assert database.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_the_schema_can_be_read(database):
    assert [row[1] for row in query(database, "PRAGMA table_info(pets)").rows] == ["name", "age"]
    assert len(query(database, "SELECT * FROM sqlite_master").rows) == 2


@pytest.mark.parametrize(
    "statement", ["\x00", "SELECT '\ud800'' FROM", "(" * 100_000, "SELECT " + "1," * 400_000 + "1"]
)
def test_a_broken_statement_is_a_query_error(database, statement):
    with pytest.raises(QueryError):
        query(database, statement)


@pytest.mark.parametrize("statement", ["", ";", "-- x"])
def test_an_empty_statement_has_an_empty_result(database, sql, statement):
    assert query(database, statement) == ResultSet([], [])
    assert "(no result)" in sql("example", statement, 1)


def test_values_keep_their_kind(database, sql):
    (row,) = query(database, "SELECT 1, 1.5, 'é', NULL, x'AB00', 9e999, CAST(x'FF' AS TEXT)").rows
    assert row == (1, 1.5, "é", None, ("blob", "ab00"), float("inf"), "\ufffd")
    assert "X'ab00'" in sql("example", "SELECT x'AB00'", 1)


def test_a_single_slow_function_is_stopped_too(database):
    start = time.perf_counter()
    with pytest.raises(QueryTimeout):
        query(database, "SELECT instr(printf('%9000000s', ''), printf('%4000000s', 'x'))", timeout_s=0.3)
    assert time.perf_counter() - start < 60  # it would take hours


@pytest.mark.parametrize(
    "greedy",
    [
        "SELECT zeroblob(2000000000)",
        "SELECT replace(printf('%9000000s', ''), ' ', 'ten letters')",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT printf('%.*c', 900000, 'x') FROM n",
    ],
)
def test_a_query_cannot_fill_the_memory(database, greedy):
    with pytest.raises(QueryError, match=r"too big|larger than|more than"):
        query(database, greedy)


def test_time_outs_are_query_errors(database):
    with pytest.raises(QueryTimeout, match=r"0\.1 s"):
        query(database, ENDLESS, timeout_s=0.1)


def test_a_missing_or_broken_database_is_an_environment_failure(folder, tmp_path):
    with pytest.raises(EnvFailure, match=r"no SQLite database at .*db_path"):
        query(database_path(folder, "nope"), "SELECT 1")
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"this is not a database" * 100)
    with pytest.raises(EnvFailure, match="cannot be read"):
        query(broken, "SELECT * FROM pets")
