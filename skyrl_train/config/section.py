"""The base class of every section of the configuration: rules checked at construction, and access to its keys."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from skyrl_train.config import refused
from skyrl_train.config.nearest import unknown_key
from skyrl_train.config.problems import NO_VALUE, ConfigError, Problem, shown, written

_SECTIONS: dict[str, type[Section]] = {}  # "trainer.policy" -> PolicyConfig; subclasses of the user's are not in it


class _Kind(type):
    """The metaclass of sections: their constructors also accept a refused key, as long as it has its default."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        key = getattr(cls, "section_key", "")
        others = [name for name in values if key and refused.reason_against(f"{key}.{name}") is not None]
        others = [name for name in others if name not in getattr(cls, "__dataclass_fields__", ())]
        given = {name: values.pop(name) for name in others}
        section = super().__call__(*args, **values)
        for name, value in given.items():
            setattr(section, name, value)
        return section


class Section(metaclass=_Kind):
    """A dataclass of the tree. It refuses to exist while one of its `rules` is broken.

    A section made by hand may still hold an interpolation such as "${trainer.max_prompt_length}"; its rules are
    checked when the whole tree is resolved (`validate_cfg`, `load_config`).
    """

    __slots__ = ("__dict__", "_followed")
    _followed: dict[
        str, Any
    ]  # refused keys that follow another key, with their values; they are no keys of the section
    takes_any_key: ClassVar[bool] = False  # whether keys beyond the fields are welcome
    section_key: ClassVar[str] = ""  # where the section stands in the tree: `class PolicyConfig(Section, at=...)`

    def __init_subclass__(cls, at: str | None = None) -> None:
        super().__init_subclass__()
        if at is not None:
            cls.section_key = at
            _SECTIONS[at] = cls

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[Problem]:
        """Return the broken rules of this section alone, after its values were normalised by `settle`."""
        self.settle()
        if any(is_interpolation(value) for value in vars(self).values()):
            return []
        unreadable = [name for name, value in vars(self).items() if isinstance(value, float) and math.isnan(value)]
        return [self.problem(name, "is not a number") for name in unreadable] or list(self.rules())

    def settle(self) -> None:
        """Normalise values into the form that all readers expect."""

    def rules(self) -> Iterator[Problem]:
        """Return what is wrong with this section."""
        return iter(())

    def problem(self, key: str, says: str, fix: tuple[str, ...] = (), drops: tuple[str, ...] | None = None) -> Problem:
        return Problem(key, getattr(self, key), says, fix, drops)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value as a mapping's get does: SkyRL's users read sections of Hydra in this way."""
        try:
            return self[key]
        except KeyError:
            return default

    def __getitem__(self, key: str) -> Any:
        value = vars(self).get(key, NO_VALUE)
        value = self._refused(key) if value is NO_VALUE else value
        if value is NO_VALUE:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in vars(self) or (isinstance(key, str) and self._refused(key) is not NO_VALUE)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field. Refuse any other name: it would change nothing and say nothing."""
        if not self._takes(name):
            key = self._key_of(name)
            if refused.reason_against(key) is None:
                raise ConfigError([unknown_key(key, value, known_keys(self))])
            moved = list(refused.moved(key, value))
            if moved:
                raise ConfigError(refusal(key, value) for key, value in moved)
            if not is_interpolation(refused.default_of(key)):  # a default that follows another key cannot be told here
                return
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # a type checker should go on naming every key that is no field

        def __getattr__(self, name: str) -> Any:
            """Return the default of a refused key, the only value it can have."""
            value = self._refused(name)
            if value is NO_VALUE:
                key = self._key_of(name)
                says = refused.reason_against(key) or "is not a key of the configuration"
                raise AttributeError(f"{key} {says}", name=name, obj=self)
            return value

    def _key_of(self, name: str) -> str:
        return f"{self.section_key}.{name}" if self.section_key else name

    def _takes(self, name: str) -> bool:
        """Return whether this name may be set: a field, an attribute of the class, or a key of the user's own."""
        if self.takes_any_key or name.startswith("_") or name in vars(self):
            return True
        return name in getattr(type(self), "__dataclass_fields__", ()) or not callable(getattr(type(self), name, len))

    def _refused(self, name: str) -> Any:
        """Return the default of a refused key, or its section; NO_VALUE for others and for one that follows another."""
        key = self._key_of(name)
        if refused.is_section(key):
            return RefusedSection.at(key)
        default = refused.default_of(key)
        if is_interpolation(default):
            default = self.followed.get(name, NO_VALUE)
        return NO_VALUE if default is NO_VALUE else copy.copy(default)

    @property
    def followed(self) -> dict[str, Any]:
        """Return the refused keys of this section whose only value is that of another key; empty before it is known."""
        try:
            return object.__getattribute__(self, "_followed")
        except AttributeError:
            return {}

    def follow(self, name: str, value: Any) -> None:
        """Keep the value of a refused key that follows another key."""
        object.__setattr__(self, "_followed", self.followed | {name: value})

    def at_least(self, minimum: float, *keys: str) -> Iterator[Problem]:
        for key in keys:
            value = getattr(self, key)
            if value is not None and value < minimum:
                yield self.problem(key, f"must be at least {minimum}")

    def finite(self, *keys: str) -> Iterator[Problem]:
        for key in keys:
            if not math.isfinite(getattr(self, key)):
                yield self.problem(key, "must be finite")

    def one_of(self, key: str, choices: Iterable[Any]) -> Iterator[Problem]:
        choices = list(choices)
        if getattr(self, key) not in choices:
            says = "must be one of " + ", ".join(shown(choice) for choice in choices)
            yield self.problem(key, says, self.nearest(key, choices))

    def nearest(self, key: str, choices: Iterable[Any]) -> tuple[str, ...]:
        """Return the setting with the choice that was probably meant, or nothing."""
        names = [choice for choice in choices if isinstance(choice, str)]
        near = difflib.get_close_matches(str(getattr(self, key)), names, n=1, cutoff=0.7)
        return tuple(written(self._key_of(key), name) for name in near)

    def within(self, low: float, high: float, *keys: str) -> Iterator[Problem]:
        """Return a problem for each key outside [low, high]."""
        for key in keys:
            if not low <= getattr(self, key) <= high:
                yield self.problem(key, f"must be from {low} to {high}")


class RefusedSection(Section):
    """A section of SkyRL's with refused keys only: cfg.trainer.placement.colocate_all can be read but not changed."""

    @classmethod
    def at(cls, key: str) -> RefusedSection:
        section = cls()
        vars(section)["section_key"] = key
        return section


def refusal(key: str, value: Any) -> Problem:
    """Return the problem of a refused key with this value: the reason, and the settings to use instead."""
    reason = refused.reason_against(key)
    assert reason is not None
    return Problem(key, value, reason, refused.instead_of(key, value))


def known_keys(section: Section) -> list[str]:
    """Return every key that does something, and those that a user's subclass added to this section."""
    keys = [section._key_of(name) for name in vars(section) if not is_section(vars(section)[name])]
    for at, cls in _SECTIONS.items():
        named = (f"{at}.{field.name}" if at else field.name for field in fields(cls))  # ty: ignore[invalid-argument-type]
        keys += [key for key in named if key not in _SECTIONS]
    return list(dict.fromkeys(keys))


def is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def is_section(value: Any) -> bool:
    """Return whether this is a Section or any other dataclass; an integration may put one into the tree."""
    return is_dataclass(value) and not isinstance(value, type)


def subsections(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return the section and every section below it with its path, children before their parents."""
    for name, value in vars(section).items():
        if is_section(value):
            yield from subsections(value, f"{prefix}.{name}" if prefix else name)
    yield prefix, section
