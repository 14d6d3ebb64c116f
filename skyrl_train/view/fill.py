"""Brings a run's index up to date, a little at a time, so that the page stays quick meanwhile."""

from __future__ import annotations

import math
import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.run.records.trajectories import iterate_trajectories
from skyrl_train.run.run_folder import TRAJECTORIES, trajectory_steps
from skyrl_train.view.folders import RunFolder
from skyrl_train.view.index import clean, has_words, spaced

GLIMPSE = 240  # characters of the last message of the prompt and of the first reply, for the list
MAX_WORDS = 200_000  # characters of an episode that can be searched
COLUMNS = (
    "file", "place", "phase", "step", "uid", "repetition", "env", "source", "reward", "end", "turns", "tokens",
    "seconds", "attempts",
)  # fmt: skip
INSERT = f"INSERT INTO episodes ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"


@dataclass(frozen=True)
class File:
    """A trajectory file as it lies on the disk now."""

    name: str
    phase: str
    step: int
    size: int
    mtime_ns: int


def files_of(run: RunFolder) -> tuple[dict[str, File], list[str]]:
    """Return the trajectory files by name, and what is wrong with those that may not be opened."""
    found, problems = {}, []
    for path, (phase, step) in trajectory_steps(run.path).items():
        name = f"{TRAJECTORIES}/{path.name}"
        try:
            status = run.file(name).stat()
        except FileNotFoundError:
            continue  # removed in this moment
        except OSError as error:
            problems.append(str(error))
            continue
        found[name] = File(name, phase, min(step, 2**53), status.st_size, status.st_mtime_ns)
    return found, problems


def bring_up_to_date(run: RunFolder, database: sqlite3.Connection, budget_s: float) -> tuple[int, list[str]]:
    """Read new and changed files until the budget is spent. Return how many are left, and what cannot be opened."""
    files, problems = files_of(run)
    deadline = time.monotonic() + budget_s
    with_words = has_words()
    database.execute("BEGIN IMMEDIATE")
    with database:  # commits, or rolls back what an error left half done
        known = {row["name"]: row for row in database.execute("SELECT * FROM files")}
        for name, row in known.items():
            if name not in files:
                _forget(database, row["id"])
        waiting = [file for file in files.values() if not _is_known(file, known.get(file.name))]
        while waiting and time.monotonic() < deadline:
            file = waiting.pop(0)
            if file.name in known:
                _forget(database, known[file.name]["id"])
            _read(run, database, file, with_words)
    return len(waiting), problems


def _is_known(file: File, row: sqlite3.Row | None) -> bool:
    return row is not None and (row["size"], row["mtime_ns"]) == (file.size, file.mtime_ns)


def _forget(database: sqlite3.Connection, file_id: int) -> None:
    database.execute("DELETE FROM glimpses WHERE id IN (SELECT id FROM episodes WHERE file = ?)", (file_id,))
    database.execute("DELETE FROM episodes WHERE file = ?", (file_id,))
    database.execute("DELETE FROM files WHERE id = ?", (file_id,))


def _read(run: RunFolder, database: sqlite3.Connection, file: File, with_words: bool) -> None:
    """Add the episodes of a file, as many as can be read, and the problem if that is not all."""
    row = (file.name, file.phase, file.step, file.size, file.mtime_ns)
    added = database.execute("INSERT INTO files (name, phase, step, size, mtime_ns) VALUES (?, ?, ?, ?, ?)", row)
    place, problem = 0, None
    try:
        for episode in iterate_trajectories(run.file(file.name)):
            _add(database, added.lastrowid, place, file, episode, with_words)
            place += 1
    except (ValueError, OSError, AttributeError, TypeError, RecursionError) as error:
        problem = clean(str(error) or type(error).__name__)[:500]
        problem = problem if file.name.rpartition("/")[2] in problem else f"{file.name} is damaged ({problem})"
    database.execute("UPDATE files SET num_episodes = ?, problem = ? WHERE id = ?", (place, problem, added.lastrowid))


def _add(
    database: sqlite3.Connection, file_id: int | None, place: int, file: File, episode: EpisodeRecord, words: bool
) -> None:
    values = (
        file_id, place, file.phase, file.step, clean(episode.uid), _whole(episode.repetition), clean(episode.env_class),
        clean(episode.data_source), _real(episode.reward), str(episode.end), len(episode.turns), episode.num_sampled,
        _real(episode.seconds), _whole(episode.num_attempts),
    )  # fmt: skip
    asked = clean(episode.messages[-1].get("content", "")) if episode.messages else ""
    said = clean(episode.turns[0].text) if episode.turns else clean(episode.failure or "")
    body = spaced(words_of(episode)[:MAX_WORDS]) if words else ""  # whatever may be wrong is so before a row is added
    number = database.execute(INSERT, values).lastrowid
    glimpses = (number, asked[:GLIMPSE], said[:GLIMPSE])
    database.execute("INSERT INTO glimpses (id, asked, said) VALUES (?, ?, ?)", glimpses)
    if words:
        database.execute("INSERT INTO words (rowid, body) VALUES (?, ?)", (number, body))


def words_of(episode: EpisodeRecord) -> str:
    """Return all that was said in the episode."""
    texts = [message.get("content", "") for message in episode.messages]
    for turn in episode.turns:
        texts += [turn.text, *(message.get("content", "") for message in turn.observation)]
    return clean("\n".join(str(text) for text in [*texts, episode.failure or ""]))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and abs(value) < 2**53 else None


def _real(value: Any) -> float | None:
    """Return a finite number, else None."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None
