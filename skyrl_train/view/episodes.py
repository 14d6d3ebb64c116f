"""Reads single episodes of a run out of its trajectory files."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path

import zstandard

from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.view.folders import RunFolder


def read_episodes(run: RunFolder, database: sqlite3.Connection, numbers: list[int]) -> list[tuple[int, EpisodeRecord]]:
    """Return the episodes with these numbers of the index, in this order. A number that is gone is left out."""
    marks = ", ".join("?" * len(numbers))
    rows = database.execute(
        "SELECT e.id, e.place, f.name, f.size, f.mtime_ns FROM episodes e JOIN files f ON f.id = e.file "
        f"WHERE e.id IN ({marks})",
        numbers,
    ).fetchall()
    by_file: dict[str, dict[int, int]] = {}
    for row in rows:
        status = run.file(row["name"]).stat()
        if (status.st_size, status.st_mtime_ns) != (row["size"], row["mtime_ns"]):
            raise ValueError(f"{row['name']} has just changed; it is read again in a moment")
        by_file.setdefault(row["name"], {})[row["place"]] = row["id"]
    found: dict[int, EpisodeRecord] = {}
    for name, places in by_file.items():
        found |= {places[place]: episode for place, episode in _lines(run.file(name), set(places)).items()}
    return [(number, found[number]) for number in numbers if number in found]


def _lines(path: Path, places: set[int]) -> dict[int, EpisodeRecord]:
    """Return the episodes at these places of a file; other lines are passed over without being parsed."""
    found: dict[int, EpisodeRecord] = {}
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        try:
            for place, line in enumerate(io.TextIOWrapper(reader, encoding="utf-8")):
                if place in places:
                    found[place] = EpisodeRecord.from_json(line)
                    if len(found) == len(places):
                        break
        except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); the other steps can still be read") from error
    return found
