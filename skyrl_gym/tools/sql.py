"""The sql tool: read-only queries on SQLite files, with limits on time and memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_gym.core import EnvFailure
from skyrl_gym.reply import printable
from skyrl_gym.tools.core import ToolGroup, tool

INVALID_ACTION = (
    "Your previous action is invalid. Write your reasoning in <think>...</think>, then either one query in "
    "<sql>...</sql> or your final query in <solution>...</solution>."
)
_MAX_TABLE = 9000  # characters; of a longer table the first rows are shown
_NUM_ROWS_SHOWN = 50
_MAX_CELL = 1000  # characters
_MAX_ROWS = 10_000
_MAX_RESULT = 5_000_000  # characters
_READER = Path(__file__).with_name("sqlite_reader.py")


class QueryError(Exception):
    """The query is wrong, not allowed or too slow, which is the fault of the policy that wrote it."""


class QueryTimeout(QueryError):
    """The query ran out of time."""


@dataclass(frozen=True, slots=True)
class ResultSet:
    columns: list[str]
    rows: list[tuple[Any, ...]]


class SQLCodeExecutorToolGroup(ToolGroup):
    """Tool for queries on `<db_file_path>/<db_id>/<db_id>.sqlite`."""

    def __init__(self, db_file_path: str) -> None:
        self.db_file_path = db_file_path
        super().__init__(name="SQLCodeExecutorToolGroup")

    @tool
    def sql(self, db_id: str, sql: str | None, turns_left: int, timeout: float = 5) -> str:
        """Return an observation with the query's result as a table, or with what was wrong with the query."""
        if sql is None:
            answer = INVALID_ACTION
        else:
            try:
                answer = _table(query(database_path(self.db_file_path, db_id), sql, timeout_s=timeout))
            except QueryTimeout:
                answer = f"SQL Timeout:\n{printable(sql[:_MAX_TABLE])}"
            except QueryError as wrong:
                answer = f"SQL error: {printable(str(wrong))[:_MAX_CELL]}"
        return f"<observation>\n{answer}\n<reminder>You have {turns_left} turns left.</reminder>\n</observation>"


def database_path(root: str, db_id: str) -> Path:
    """Return the file of a database. ValueError for a name that leads out of the folder of the databases."""
    if db_id in ("", ".", "..") or any(sign in db_id for sign in "/\\\0"):
        raise ValueError(f"db_id={db_id!r} must be the name of a folder in {root}, not a path")
    return Path(root) / db_id / f"{db_id}.sqlite"


def query(path: Path, sql: str, *, timeout_s: float = 5, max_rows: int = _MAX_ROWS) -> ResultSet:
    """Return the first rows of one read-only statement, run in a process that is killed when the time is up.

    QueryError for a bad query, EnvFailure for a bad database. A blob is the tuple ("blob", hex).
    """
    if not path.is_file():
        raise EnvFailure(f"there is no SQLite database at {path}; is db_path right?")
    request = {
        "path": str(path.absolute()),
        "sql": printable(sql),
        "max_rows": max_rows,
        "max_size": _MAX_RESULT,
        "cpu_s": math.ceil(timeout_s) + 1,
    }
    try:
        result = subprocess.run(
            [sys.executable, "-I", str(_READER)],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            env={},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise QueryTimeout(f"more than {timeout_s} s") from None
    except OSError as refused:
        raise EnvFailure(f"cannot start a Python process for the query: {refused}") from refused
    if result.returncode != 0:
        raise QueryError(f"the query was stopped (too much memory?): {result.stderr[-200:]}")
    answer = json.loads(result.stdout)
    if "broken" in answer:
        raise EnvFailure(f"{path} cannot be read: {answer['broken']}")
    if "error" in answer:
        raise QueryError(answer["error"])
    rows = [tuple(tuple(value) if isinstance(value, list) else value for value in row) for row in answer["rows"]]
    return ResultSet(answer["columns"], rows)


def _table(result: ResultSet) -> str:
    """Return the rows under their column names; a table that is too long is cut to its first rows."""
    text = _lines(result.columns, result.rows)
    if len(text) <= _MAX_TABLE:
        return text
    shown = _lines(result.columns, result.rows[:_NUM_ROWS_SHOWN])[: 2 * _MAX_TABLE]
    more = f"at least {_MAX_ROWS}" if len(result.rows) == _MAX_ROWS else str(len(result.rows))
    return f"{shown}\nTruncated to the first {_NUM_ROWS_SHOWN} of {more} rows: the result is too large to show."


def _lines(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    if not columns:
        return "(no result)"
    lines = [" | ".join(columns), *(" | ".join(_cell(value) for value in row) for row in rows)]
    return printable("\n".join(lines if rows else [*lines, "(no rows)"]))


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return f"X'{value[1][:_MAX_CELL]}'"
    return str(value)[:_MAX_CELL]
