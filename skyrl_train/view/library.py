"""All runs below the given folders, kept up to date by a thread of its own while somebody looks."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from skyrl_train.run.run_folder import METRICS, RUN_INFO, TRAJECTORIES
from skyrl_train.view.ask import choices_of
from skyrl_train.view.columns import Columns, Print, print_of
from skyrl_train.view.fill import bring_up_to_date
from skyrl_train.view.folders import RunFolder, find_runs
from skyrl_train.view.index import VERSION, index_path, open_to_read, open_to_write, remove
from skyrl_train.view.summary import NEEDED, description_of, state_of, summary_of

SCAN_EVERY_S, LOOKED_AT_S = 2.0, 15.0  # nothing is read while no page asked for so long
BUDGET_S = 0.4  # of reading files before the next run has its turn
KEPT_COLUMNS = 48  # runs whose metrics stay in memory


@dataclass
class Entry:
    """The facts known of a run."""

    folder: RunFolder
    index: Path | None = None  # None until the index exists
    prints: tuple[Print | None, ...] = ()  # of metrics, run.json and the trajectories' folder, when last read
    summary: dict[str, Any] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    num_episodes: int = 0
    files_left: int | None = None  # None until the index was looked at
    problems: list[str] = field(default_factory=list)
    version: int = 0  # grows when something changed

    @property
    def is_read(self) -> bool:
        return self.files_left == 0


class Library:
    """The runs by id. `version` grows with every change, so that a page knows when to ask again."""

    def __init__(self, roots: list[Path]) -> None:
        self.roots, self.entries, self.version = roots, dict[str, Entry](), 0
        self.columns: OrderedDict[str, Columns] = OrderedDict()
        self.lock = threading.Lock()  # of columns
        self.is_closed = threading.Event()
        self.asked_at, self.wanted = time.monotonic(), ""
        self.look_for_runs()
        self.thread = threading.Thread(target=self._work, name="runs", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self.is_closed.set()
        if self.thread.is_alive():
            self.thread.join(timeout=10)

    def look_for_runs(self) -> None:
        """Add runs that are new and drop those that are gone."""
        found = {run.id: run for root in self.roots for run in find_runs(root)}
        for gone in self.entries.keys() - found.keys():
            del self.entries[gone]
            self.version += 1
        for name in found.keys() - self.entries.keys():
            self.entries[name] = Entry(found[name])
            self.version += 1

    def want(self, run: str) -> Entry | None:
        """Return a run that somebody looks at; its files are read before those of others."""
        self.asked_at, self.wanted = time.monotonic(), run
        return self.entries.get(run)

    def columns_of(self, entry: Entry) -> Columns:
        """Return the metrics of a run as they are now."""
        with self.lock:
            columns = self.columns.setdefault(entry.folder.id, Columns())
            self.columns.move_to_end(entry.folder.id)
            while len(self.columns) > KEPT_COLUMNS:
                self.columns.popitem(last=False)
            columns.update(entry.folder.file(METRICS))
            return columns

    def _work(self) -> None:
        while not self.is_closed.is_set():
            if time.monotonic() - self.asked_at < LOOKED_AT_S:
                self.look_for_runs()
                while self._one_round() and not self.is_closed.is_set():
                    pass
            self.is_closed.wait(SCAN_EVERY_S)

    def _one_round(self) -> bool:
        """Give every run that changed its turn, the wanted one first. Return whether something is left."""
        is_left, wanted = False, ""  # wanted: the one of which nothing is left in this round
        for entry in list(self.entries.values()):
            while (name := self.wanted) != wanted and not self.is_closed.is_set():
                if name not in self.entries or not self._refresh(self.entries[name]):
                    wanted = name
            if not self.is_closed.is_set():
                is_left |= self._refresh(entry)
        return is_left

    def _refresh(self, entry: Entry) -> bool:
        """Read what changed of a run. Return whether files are left to read."""
        try:
            prints = self._prints(entry)
            state = state_of(
                entry.folder, entry.description, entry.summary.get("step", 0), entry.summary.get("total_steps")
            )
            if prints == entry.prints and entry.is_read and entry.summary.get("state") == state:
                return False
            with closing(self._opened(entry)) as database:
                self._summarise(entry, database, prints)
                left, problems = bring_up_to_date(entry.folder, database, BUDGET_S)
                entry.num_episodes = database.execute("SELECT count(*) FROM episodes").fetchone()[0]
                listed = database.execute("SELECT problem FROM files WHERE problem IS NOT NULL ORDER BY step LIMIT 100")
                entry.problems += [*problems, *(row[0] for row in listed)]
        except sqlite3.DatabaseError as error:
            self._start_anew(entry, str(error))
            return False
        except (OSError, RecursionError) as error:  # a run.json nested so deeply that it can be read but not written
            entry.problems, entry.files_left, entry.prints = [str(error)], 0, self._prints(entry, safe=True)
            self.version += 1
            return False
        entry.files_left, entry.prints = left, prints
        entry.version += 1
        self.version += 1
        return left > 0

    def _prints(self, entry: Entry, *, safe: bool = False) -> tuple[Print | None, ...]:
        found: list[Print | None] = []
        for name in (METRICS, RUN_INFO):
            try:
                found.append(print_of(entry.folder.file(name)))
            except OSError:
                if not safe:
                    raise
                found.append(None)
        return (*found, print_of(entry.folder.path / TRAJECTORIES))

    def _opened(self, entry: Entry) -> sqlite3.Connection:
        if entry.index is None or not entry.index.exists():
            path = index_path(entry.folder.path)
            database = open_to_write(path)
            entry.index = path
            return database
        return open_to_write(entry.index, is_known=True)

    def _start_anew(self, entry: Entry, why: str) -> None:
        """Drop an index that cannot be used: it holds nothing of its own."""
        logger.warning(f"the index of {entry.folder.path} is built anew: {why}")
        if entry.index is not None and "locked" not in why:
            remove(entry.index)
        entry.files_left = None

    def _summarise(self, entry: Entry, database: sqlite3.Connection, prints: tuple[Print | None, ...]) -> None:
        """Take the summary from the index, where one of the same files lies, or make it."""
        key = json.dumps([VERSION, prints[:2]])
        kept = dict(database.execute("SELECT key, value FROM meta").fetchall())
        if kept.get("print") == key:
            entry.description, summary, entry.problems = json.loads(kept["summary"])
        else:
            entry.description, problem = description_of(entry.folder)
            columns = self._columns_for_summary(entry)
            summary = summary_of(entry.folder, entry.description, columns)
            entry.problems = [text for text in (problem, *_complaints(columns)) if text]
            value = json.dumps([entry.description, summary, entry.problems])
            rows = [("print", key), ("summary", value)]
            database.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", rows)
        state = state_of(entry.folder, entry.description, summary["step"], summary["total_steps"])
        entry.summary = summary | {"state": state}

    def _columns_for_summary(self, entry: Entry) -> Columns:
        """Return the metrics that the table needs, or all of a run that is looked at or grows: they are in memory."""
        if entry.folder.id in self.columns or entry.folder.is_written_now():
            return self.columns_of(entry)
        columns = Columns(NEEDED)
        columns.update(entry.folder.file(METRICS))
        return columns

    def table(self) -> list[dict[str, Any]]:
        """Return the row of each run."""
        return [
            {
                "id": entry.folder.id,
                "name": entry.folder.name,
                "episodes": entry.num_episodes,
                "files_left": entry.files_left,
                "problems": len(entry.problems),
                **entry.summary,
            }
            for entry in list(self.entries.values())
        ]

    def detail(self, entry: Entry) -> dict[str, Any]:
        """Return all that is known of a run but its metrics' values and its episodes."""
        choices: dict[str, Any] = {}
        if entry.index is not None and entry.index.exists():
            with open_to_read(entry.index) as database:
                choices = choices_of(database)
        try:
            columns = self.columns_of(entry)
            keys = sorted(columns.columns.keys() - {"step"})
        except OSError:
            keys = []
        return {
            "id": entry.folder.id,
            "name": entry.folder.name,
            "folder": str(entry.folder.path),
            "summary": entry.summary,
            "description": entry.description,
            "metrics": keys,
            "problems": entry.problems,
            "files_left": entry.files_left,
            "version": entry.version,
            **{key: value for key, value in choices.items() if key != "problems"},
        }


def _complaints(columns: Columns) -> list[str]:
    found = []
    if columns.damaged:
        numbers = ", ".join(str(number) for number in columns.damaged[:10])
        found.append(f"{METRICS}: line {numbers} cannot be read and was left out")
    if columns.too_many:
        found.append(f"{METRICS}: only the first {len(columns.columns)} metrics are shown")
    return found
