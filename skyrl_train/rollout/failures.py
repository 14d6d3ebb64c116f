"""The environment failures of one round: each kind is logged once, and counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from loguru import logger

MAX_KINDS_SAID = 5  # kinds that are logged in a round; more are only counted
MAX_KEY_CHARS = 160  # characters of a failure's text that identify its kind
_VARYING = re.compile(r"0x[0-9a-f]+|[0-9]+")  # differs within a kind: ports, pids, ids, seconds


@dataclass
class Failures:
    """Counts failures by kind: two failures whose texts differ only in numbers are of one kind."""

    counts: dict[str, int] = field(default_factory=dict)  # kind -> number of failed attempts
    firsts: dict[str, str] = field(default_factory=dict)  # kind -> the text of its first failure

    @staticmethod
    def of(failures: Iterable[str]) -> Failures:
        """Return the failures counted, without logging them."""
        counted = Failures()
        for words in failures:
            counted.count(words)
        return counted

    def count(self, words: str) -> bool:
        """Count a failure by its text. Return whether it is the first of its kind."""
        kind = kind_of(words)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.firsts.setdefault(kind, words)
        return self.counts[kind] == 1

    def add(self, episode_id: str, words: str, what_now: str) -> None:
        """Count a failure, and log it if it is the first of its kind; what_now says what becomes of the episode."""
        if self.count(words) and len(self.firsts) <= MAX_KINDS_SAID:
            logger.warning(f"episode {episode_id} failed ({what_now}): {words}")

    def say_how_many(self) -> None:
        """Log after the round how often each kind of failure came again."""
        for number, (kind, count) in enumerate(self.counts.items()):
            if number < MAX_KINDS_SAID and count > 1:
                logger.warning(f"and {count - 1} more like it: {_beginning(self.firsts[kind])}")
        unsaid = list(self.counts.values())[MAX_KINDS_SAID:]
        if unsaid:
            logger.warning(f"and {sum(unsaid)} failures of {len(unsaid)} other kinds")

    def commonest(self) -> tuple[str, int]:
        """Return the text of the most frequent kind of failure and its count."""
        kind = max(self.counts, key=lambda kind: self.counts[kind])
        return self.firsts[kind], self.counts[kind]


def kind_of(words: str) -> str:
    return _VARYING.sub("#", words)[:MAX_KEY_CHARS]


def _beginning(words: str) -> str:
    first_line = words.split("\n", 1)[0]
    return first_line if len(first_line) <= MAX_KEY_CHARS else f"{first_line[:MAX_KEY_CHARS]}…"
