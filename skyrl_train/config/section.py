"""What every section of the configuration shares: rules that are checked when it comes into being, and their errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, ClassVar

NO_VALUE: Any = object()  # a problem of the key itself


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one key: `trainer.epochs=0 must be at least 1`."""

    key: str
    value: Any
    says: str
    fix: tuple[str, ...] = ()  # settings (key=value) that solve it once those of `key` are dropped

    def under(self, section: str) -> Problem:
        """The same problem, seen from the section that holds it."""
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


class Section:
    """A dataclass of the tree. It refuses to exist while one of its `rules` is broken.

    A section made by hand may still hold an interpolation such as "${trainer.max_prompt_length}"; its rules are
    checked when the whole tree is resolved (`validate_cfg`, `load_config`).
    """

    takes_any_key: ClassVar[bool] = False  # whether keys beyond the fields are welcome

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[Problem]:
        """The broken rules of this section alone, after its values were settled."""
        self.settle()
        return [] if any(is_interpolation(value) for value in vars(self).values()) else list(self.rules())

    def settle(self) -> None:
        """Bring values into the form that everyone below reads."""

    def rules(self) -> Iterator[Problem]:
        """What is wrong with this section."""
        return iter(())

    def problem(self, key: str, says: str, fix: tuple[str, ...] = ()) -> Problem:
        return Problem(key, getattr(self, key), says, fix)

    def get(self, key: str, default: Any = None) -> Any:
        """As a mapping's get: SkyRL's users read sections of Hydra in this way."""
        return vars(self).get(key, default)

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def __contains__(self, key: object) -> bool:
        return key in vars(self)

    def at_least(self, minimum: float, *keys: str) -> Iterator[Problem]:
        for key in keys:
            value = getattr(self, key)
            if value is not None and value < minimum:
                yield self.problem(key, f"must be at least {minimum}")

    def one_of(self, key: str, choices: Iterable[Any]) -> Iterator[Problem]:
        choices = list(choices)
        if getattr(self, key) not in choices:
            yield self.problem(key, "must be one of " + ", ".join(shown(choice) for choice in choices))

    def within(self, low: float, high: float, *keys: str) -> Iterator[Problem]:
        """Both ends included."""
        for key in keys:
            if not low <= getattr(self, key) <= high:
                yield self.problem(key, f"must be from {low} to {high}")


def is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def written(key: str, value: Any) -> str:
    """`key=value` as Hydra's grammar reads it back."""
    text = shown(value)
    if isinstance(value, str) and not (value and all(letter.isalnum() or letter in "_-./:+" for letter in value)):
        text = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}={text}"


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    return str(value) if value != "" else "''"


def is_section(value: Any) -> bool:
    """A Section, or any other dataclass, which an integration may put into the tree."""
    return is_dataclass(value) and not isinstance(value, type)


def subsections(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The section and every section below it with its path, depth first, children before their parents."""
    for name, value in vars(section).items():
        if is_section(value):
            yield from subsections(value, f"{prefix}.{name}" if prefix else name)
    yield prefix, section
