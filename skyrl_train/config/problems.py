"""Problems of a configuration, in words: one problem of one key, and the error that holds all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

NO_VALUE: Any = object()  # a problem of the key itself


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one key: `trainer.epochs=0 must be at least 1`."""

    key: str
    value: Any
    says: str
    fix: tuple[str, ...] = ()  # settings (key=value) that solve it once those of `drops` are dropped
    drops: tuple[str, ...] | None = None  # keys that the correction takes away; None: `key`

    def under(self, section: str) -> Problem:
        """Return the same problem with its key as seen from the section above."""
        return replace(self, key=".".join(filter(None, (section, self.key))))

    def __str__(self) -> str:
        setting = self.key if self.value is NO_VALUE else f"{self.key}={shown(self.value)}"
        return f"{setting} {self.says}"


class ConfigError(ValueError):
    """Every problem of one configuration, in one readable message."""

    def __init__(self, problems: Iterable[Problem], to_paste: str = "") -> None:
        self.problems, self.to_paste = list(problems), to_paste
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems in the configuration:", *(f"- {line}" for line in lines)]
        super().__init__("\n".join(lines) + to_paste)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem], str]]:
        return type(self), (self.problems, self.to_paste)


class Unfit(ValueError):
    """Settings do not fit this machine, model or data, as was found after they were read. `fix`: some that would."""

    def __init__(self, words: str, *fix: str) -> None:
        super().__init__(words)
        self.fix = fix


def written(key: str, value: Any) -> str:
    """Return `key=value` in the form in which Hydra's grammar reads it."""
    return f"{key}={_in_grammar(value)}"


def _in_grammar(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_in_grammar(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not (value and all(letter.isalnum() or letter in "_-./:+" for letter in value)):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return shown(value)


def shown(value: Any) -> str:
    """Return a value in the form in which it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    return str(value) if value != "" else "''"
