"""Program that runs one read-only statement on a SQLite file: JSON comes in on stdin and goes out on stdout.

It runs in its own process, because nothing inside a process can stop SQLite in the middle of a function: one printf or
trim runs for minutes, and a progress handler is not called meanwhile. `sql.query` starts it and kills it when the time
is up. It needs no sandbox: the program is ours, opens a database of ours, and allows no SQL but reading.

in   {"path": ..., "sql": ..., "max_rows": ..., "max_size": ..., "cpu_s": ...}
out  {"columns": [...], "rows": [[...], ...]}, {"error": ...} (the statement's fault) or {"broken": ...} (the file's)
"""

from __future__ import annotations

import contextlib
import json
import resource
import sqlite3
import sys
from pathlib import Path
from typing import Any

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
SCHEMA_PRAGMAS = {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "foreign_key_list"}
MEMORY_BYTES = 1 << 30
BROKEN_FILE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN}


def authorize(action: int, first: str | None, *_: str | None) -> int:
    """Allow reading and the PRAGMAs on the schema; deny every write (also to temporary tables) and ATTACH.

    SQLite calls it for each action of a statement, with the action's code and, for a PRAGMA, its name as `first`.
    """
    allowed = action in READING or (action == sqlite3.SQLITE_PRAGMA and first in SCHEMA_PRAGMAS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def first_rows(cursor: sqlite3.Cursor, max_rows: int, max_size: int) -> list[list[Any]]:
    """Return at most `max_rows` rows. A blob becomes ["blob", hex], which equals no other value.

    ValueError: the rows hold more than `max_size` characters.
    """
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        rows.append([["blob", value.hex()] if isinstance(value, bytes) else value for value in row])
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if size > max_size:
            raise ValueError(f"the result is larger than {max_size} characters")
        if len(rows) == max_rows:
            break
    return rows


def answer(path: str, sql: str, max_rows: int, max_size: int) -> dict[str, Any]:
    try:
        connection = sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000_000)  # one value or statement, in bytes
        connection.set_authorizer(authorize)
        cursor = connection.execute(sql)
        rows = first_rows(cursor, max_rows, max_size)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as wrong:
        broken = getattr(wrong, "sqlite_errorcode", None) in BROKEN_FILE
        return {"broken" if broken else "error": str(wrong)}
    except MemoryError:
        return {"error": "out of memory"}
    return {"columns": [column[0] for column in cursor.description or ()], "rows": rows}


def set_limits(cpu_s: int) -> None:
    for name, limit in (("RLIMIT_CPU", cpu_s), ("RLIMIT_AS", MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # this system does not have the limit
            resource.setrlimit(getattr(resource, name), (limit, limit))


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    set_limits(request.pop("cpu_s"))
    sys.stdout.write(json.dumps(answer(**request)))
