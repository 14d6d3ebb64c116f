"""The index of a run's episodes: an SQLite file beside `trajectories/`, safe to delete at any time.

It holds a row per episode, their words for the search, and what was wrong with files that could not be read whole. Each
trajectory file is known by size and time, so only what is new or changed is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

NAME = ".view.sqlite"
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE files (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, phase TEXT, step INTEGER, "
    "size INTEGER, mtime_ns INTEGER, num_episodes INTEGER, problem TEXT)",
    # AUTOINCREMENT: a number is never given twice, so words of removed episodes, which stay, find nothing.
    "CREATE TABLE episodes (id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER, place INTEGER, phase TEXT, "
    "step INTEGER, uid TEXT, repetition INTEGER, env TEXT, source TEXT, reward REAL, end TEXT, turns INTEGER, "
    "tokens INTEGER, seconds REAL, attempts INTEGER)",
    "CREATE INDEX by_file ON episodes (file)",
    "CREATE INDEX by_step ON episodes (step)",  # an index ends with the row's number, so pages in this order are walked
    "CREATE INDEX by_reward ON episodes (reward)",
    "CREATE INDEX by_task ON episodes (uid, phase, step)",
    "CREATE TABLE glimpses (id INTEGER PRIMARY KEY, asked TEXT, said TEXT)",
)
WORDS = (
    "CREATE VIRTUAL TABLE words USING fts5(body, content='', tokenize='unicode61 remove_diacritics 2', prefix='1 2 3')"
)
VERSION = int(hashlib.sha256(repr((SCHEMA, WORDS, 2)).encode()).hexdigest()[:7], 16)  # another one is built anew
# Scripts without spaces between words: each character becomes a word, and a searched word a phrase of them.
WITHOUT_SPACES = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])")


def has_words() -> bool:
    """Return whether this SQLite has the full-text search."""
    with closing(sqlite3.connect(":memory:")) as database:
        try:
            database.execute(WORDS)
        except sqlite3.OperationalError:
            return False
    return True


def index_path(run_folder: Path) -> Path:
    """Return the file of the index: in the run's folder, or in the user's cache if that folder cannot be written."""
    beside = run_folder / NAME
    is_free = not beside.is_symlink() and (beside.is_file() or not beside.exists())
    if is_free and _can_be_written(run_folder):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "skyrl-view"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    return cache / f"{hashlib.sha256(os.fsencode(run_folder)).hexdigest()[:24]}.sqlite"


def _can_be_written(folder: Path) -> bool:
    """Return whether a file can be made there; root is told so only by trying."""
    if not os.access(folder, os.W_OK):
        return False
    attempt = folder / f"{NAME}.{os.getpid()}"
    try:
        attempt.touch(exist_ok=False)
        attempt.unlink()
    except OSError:
        return False
    return True


def open_to_write(path: Path, *, is_known: bool = False) -> sqlite3.Connection:
    """Open the index, and build it anew if it is missing, damaged, foreign or of another version.

    is_known: this process has opened it before, so it need not be checked again.
    """
    if path.exists():
        try:
            database = _connected(path)
            if is_known or _is_ours(database):
                return database
            database.close()
        except sqlite3.DatabaseError:
            pass
        remove(path)
    database = _connected(path)
    with database:
        for statement in (*SCHEMA, *([WORDS] if has_words() else [])):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {VERSION}")
    return database


@contextmanager
def open_to_read(path: Path) -> Generator[sqlite3.Connection]:
    """Open the index that open_to_write has made."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as database:
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA cache_size = -32000")
        database.row_factory = sqlite3.Row
        yield database


def remove(path: Path) -> None:
    for name in (path, path.with_name(path.name + "-journal")):
        name.unlink(missing_ok=True)


def spaced(text: str) -> str:
    """Return the text with a space around each character of a script that has none: "第一 go" -> " 第  一  go"."""
    return WITHOUT_SPACES.sub(r" \1 ", text)


def clean(value: Any) -> str:
    """Return a text that SQLite takes: half of a surrogate pair becomes "?", as does the NUL that ends C's strings."""
    return str(value).replace("\0", "?").encode("utf-8", "replace").decode()


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    for setting in (
        "trusted_schema = OFF",
        "journal_mode = TRUNCATE",
        "synchronous = OFF",  # after a power cut the index is built anew
        "cache_size = -64000",
        "cache_spill = OFF",  # a spill would lock readers out in the middle of a transaction
    ):
        database.execute(f"PRAGMA {setting}")
    database.row_factory = sqlite3.Row
    return database


def _is_ours(database: sqlite3.Connection) -> bool:
    """Return whether the tables are exactly ours: the file may have come with a folder from somebody else."""
    if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
        return False
    wanted = {*SCHEMA, *([WORDS] if has_words() else [])}
    found = {row[0] for row in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    own = {sql for sql in found if sql in wanted}
    others = {sql for sql in found - own if not re.match(r"CREATE TABLE ('words_\w+'|sqlite_sequence)", sql)}
    return own == wanted and not others and database.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
