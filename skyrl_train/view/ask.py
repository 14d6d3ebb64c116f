"""Asks a run's index: filtered pages of episodes, what there is to filter by, validation tasks over the steps."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.view.index import clean, spaced

SORTS = {
    "step": "e.step, e.id", "reward": "e.reward, e.id", "tokens": "e.tokens, e.id", "turns": "e.turns, e.id",
    "seconds": "e.seconds, e.id", "prompt": "e.uid, e.step, e.id",
    "typical": "abs(e.reward - (SELECT avg(reward) FROM episodes)), e.id",
}  # fmt: skip
MAX_PAGE = 500
WORD = re.compile(r'"([^"]*)"?|(\S+)')


class BadQuestion(ValueError):
    """The address asks for something that there is not; the message says what."""


@dataclass
class Filter:
    """Conditions on episodes as SQL, values apart. phrase: of the full-text search; the conditions name its `hits`."""

    conditions: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    phrase: str = ""

    def add(self, condition: str, *values: Any) -> None:
        self.conditions.append(condition)
        self.values += values

    @property
    def where(self) -> str:
        return f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""

    def search(self, database: sqlite3.Connection) -> None:
        """Search the words once for all questions of this connection, into `hits`, a table of numbers in memory."""
        if self.phrase:
            database.execute("PRAGMA temp_store = MEMORY")
            database.execute("CREATE TEMP TABLE hits (id INTEGER PRIMARY KEY)")
            database.execute("INSERT INTO hits SELECT rowid FROM words WHERE words MATCH ?", (self.phrase,))


def filter_of(question: Mapping[str, str], with_words: bool) -> Filter:
    """Return the filter that an address asks for: phase, end, env, source, prompt, step, reward, text."""
    found = Filter()
    for name, column in (("phase", "phase"), ("end", "end"), ("env", "env"), ("source", "source"), ("prompt", "uid")):
        if value := question.get(name, ""):
            found.add(f"e.{column} = ?", clean(value))
    for name, column, sign in (
        ("step_from", "step", ">="), ("step_to", "step", "<="), ("reward_from", "reward", ">="),
        ("reward_to", "reward", "<="),
    ):  # fmt: skip
        if value := question.get(name, ""):
            found.add(f"e.{column} {sign} ?", real(name, value))
    if text := question.get("text", "").strip():
        _add_text(found, clean(text), with_words)
    return found


def _add_text(found: Filter, text: str, with_words: bool) -> None:
    """Each word must begin a word of the episode, a "quoted text" stand in it; signs alone are looked for as such."""
    phrase = match_of(text) if with_words else ""
    if phrase:
        # "+": walk the episodes in the order of the page and stop when it is full, rather than sort all that match.
        found.add("+e.id IN (SELECT id FROM hits)")
        found.phrase = phrase
        return
    likeness = "%" + re.sub(r"([\\%_])", r"\\\1", text.strip('"')) + "%"
    found.add(
        r"e.id IN (SELECT id FROM glimpses WHERE asked LIKE ? ESCAPE '\' OR said LIKE ? ESCAPE '\')", likeness, likeness
    )


def match_of(text: str) -> str:
    """Return the FTS5 expression of a search, everything quoted: `big "a cat"` -> `"big"* AND "a cat"`."""
    parts = []
    for quoted, word in WORD.findall(text):
        term = spaced(quoted or word).replace('"', " ").strip()
        if any(character.isalnum() for character in term):
            parts.append(f'"{term}"' if quoted else f'"{term}"*')
    return " AND ".join(parts)


def page_of(database: sqlite3.Connection, question: Mapping[str, str], with_words: bool) -> dict[str, Any]:
    """Return `total` and the rows of one page: offset, limit, sort ("-reward" descends)."""
    found = filter_of(question, with_words)
    sort = question.get("sort") or "-step"
    columns = SORTS.get(sort.removeprefix("-"))
    if columns is None:
        raise BadQuestion(f"sort={sort!r} is none of {', '.join(SORTS)}")
    direction = "DESC" if sort.startswith("-") else "ASC"
    order = ", ".join(f"{column} {direction}" for column in columns.split(", "))
    limit = min(max(int(real("limit", question.get("limit") or "100")), 1), MAX_PAGE)
    offset = max(int(real("offset", question.get("offset") or "0")), 0)
    found.search(database)
    total = database.execute(f"SELECT count(*) FROM episodes e {found.where}", found.values).fetchone()[0]
    chosen = f"SELECT e.* FROM episodes e {found.where} ORDER BY {order} LIMIT ? OFFSET ?"
    rows = database.execute(
        f"SELECT c.*, g.asked, g.said FROM ({chosen}) c LEFT JOIN glimpses g ON g.id = c.id",
        [*found.values, limit, offset],
    )
    return {"total": total, "offset": offset, "rows": [_row(row) for row in rows]}


def _row(row: sqlite3.Row) -> dict[str, Any]:
    return {key: row[key] for key in row.keys() if key not in ("file", "place")}  # noqa: SIM118, a Row iterates values


def choices_of(database: sqlite3.Connection) -> dict[str, Any]:
    """Return what episodes can be filtered by, the number of episodes, and the problems of files."""
    found: dict[str, Any] = {}
    for name, column in (("phases", "phase"), ("ends", "end"), ("envs", "env"), ("sources", "source")):
        rows = database.execute(f"SELECT {column}, count(*) FROM episodes GROUP BY 1 ORDER BY 2 DESC LIMIT 100")
        found[name] = {row[0]: row[1] for row in rows}
    low, high, count = database.execute("SELECT min(step), max(step), count(*) FROM episodes").fetchone()
    problems = database.execute("SELECT problem FROM files WHERE problem IS NOT NULL ORDER BY step LIMIT 100")
    return found | {"steps": [low, high], "episodes": count, "problems": [row[0] for row in problems]}


def group_of(database: sqlite3.Connection, number: int) -> list[dict[str, Any]]:
    """Return the rows of the episode's group: the same prompt in the same step."""
    rows = database.execute(
        "SELECT o.* FROM episodes e JOIN episodes o ON o.uid = e.uid AND o.phase = e.phase AND o.step = e.step "
        "WHERE e.id = ? ORDER BY o.repetition, o.id LIMIT 256",
        (number,),
    )
    return [_row(row) for row in rows]


def tasks_of(database: sqlite3.Connection, phase: str) -> dict[str, Any]:
    """Return each task's mean reward, number of episodes and first episode at each step; what was played most first."""
    rows = database.execute(
        "SELECT uid, step, avg(reward), count(*), min(id) FROM episodes WHERE phase = ? GROUP BY uid, step", (phase,)
    ).fetchall()
    tasks: dict[str, dict[int, list[Any]]] = {}
    for uid, step, reward, count, first in rows[:200_000]:
        tasks.setdefault(uid, {})[step] = [reward, count, first]
    names = dict(
        database.execute(
            "SELECT e.uid, g.asked FROM (SELECT uid, min(id) AS id FROM episodes WHERE phase = ? GROUP BY uid) e "
            "JOIN glimpses g ON g.id = e.id",
            (phase,),
        ).fetchall()
    )
    steps = sorted({step for found in tasks.values() for step in found})
    ordered = sorted(tasks, key=lambda uid: (-len(tasks[uid]), len(uid), uid))
    return {
        "steps": steps,
        "tasks": [
            {"uid": uid, "asked": names.get(uid, ""), "cells": [tasks[uid].get(step) for step in steps]}
            for uid in ordered
        ],
    }


def real(name: str, text: str) -> float:
    """Return a number from an address. BadQuestion if it is none."""
    try:
        value = float(text)
    except ValueError:
        raise BadQuestion(f"{name}={text!r} is no number") from None
    if not abs(value) < 2**53:
        raise BadQuestion(f"{name}={text!r} is too large")
    return value
