"""The columns of `metrics.jsonl`, read as the file grows."""

from __future__ import annotations

import json
import math
import os
from array import array
from pathlib import Path
from typing import Any

MAX_COLUMNS = 5_000  # more keys than this are left out, and named as a problem
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as MetricsLog writes them
Print = tuple[int, int, int]  # of a file: inode, size, time of its last change in ns


def print_of(path: Path) -> Print | None:
    """Return what tells whether a file changed; None if it is missing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Columns:
    """step -> value of each metric. A damaged line is left out and counted, an unfinished last line waits."""

    def __init__(self, only: tuple[str, ...] | None = None) -> None:
        """Take the metrics to read; None: all."""
        self.only = only
        self._clear()

    def _clear(self) -> None:
        self.steps: dict[int, int] = {}  # step -> row
        self.columns: dict[str, array[float]] = {}
        self.damaged: list[int] = []  # numbers of lines
        self.too_many = False
        self.inode, self.offset, self.num_lines = -1, 0, 0

    def update(self, path: Path) -> None:
        """Read what was appended, or the whole file if it was replaced."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            self._clear()
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.offset:
                self._clear()
                self.inode = status.st_ino
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                self.num_lines += 1
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            fields = json.loads(line)
            step = int(fields["step"])
            wanted = fields if self.only is None else [key for key in self.only if key in fields]
            numbers = [(key, number(fields[key])) for key in wanted]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            self.damaged.append(self.num_lines)
            return
        if abs(step) > 2**53:
            self.damaged.append(self.num_lines)
            return
        row = self.steps.setdefault(step, len(self.steps))
        for key, value in numbers:
            if value is not None:
                self._set(key, row, value)

    def _set(self, key: str, row: int, value: float) -> None:
        column = self.columns.get(key)
        if column is None:
            if len(self.columns) >= MAX_COLUMNS:
                self.too_many = True
                return
            column = self.columns[key] = array("d")
        if len(column) <= row:
            column.extend([math.nan] * (row + 1 - len(column)))
        column[row] = value

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return the finite values of a metric by step."""
        column = self.columns.get(key, array("d"))
        rows = ((step, column[row]) for step, row in self.steps.items() if row < len(column))
        return sorted((step, value) for step, value in rows if math.isfinite(value))


def number(value: Any) -> float | None:
    """Return a metric's value as a number; None for texts and for what JSON knows besides."""
    if isinstance(value, str):
        return NOT_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def thinned(points: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """Return at most `limit` of the points, evenly spread, the first and the last among them."""
    if len(points) <= limit:
        return points
    last = len(points) - 1
    return [points[round(i * last / (limit - 1))] for i in range(limit)]
