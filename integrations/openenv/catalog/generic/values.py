"""Fields of actions by their JSON schema: described in words, read from a model's text, drawn at random."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from integrations.openenv.catalog.entry import InvalidAction
from integrations.openenv.catalog.generic.validation import json_value, resolved
from integrations.openenv.catalog.words import WORDS

MAX_SHOWN_CHOICES = 40
MAX_WRITTEN_CHARS = 10_000  # of a field: no action is longer (CatalogEntry.max_action_chars)
INTEGER = re.compile(r"[-+]?\d{1,18}")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")
QUOTED = re.compile(r'"([^"\n]{1,40})"')
MAX_HINTED_CHARS = 2000
SEPARATORS = re.compile(r"[,;\s]+")
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
Legal = Sequence[int | str]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an action."""

    name: str
    schema: dict[str, Any]  # references followed, "or null" left out
    required: bool
    kind: str  # string, integer, number, boolean, choice, list, json
    hints: tuple[str, ...] = ()  # of a text: examples, and what its descriptions put in quotation marks

    @classmethod
    def of(cls, name: str, schema: Any, root: dict[str, Any], *, required: bool) -> Field:
        schema = resolved(schema, root)
        kind = _kind(schema, root)
        if kind == "list":
            schema = {**schema, "items": resolved(schema["items"], root)}
        return cls(name, schema, required, kind, _hints(schema, root) if kind == "string" else ())

    @property
    def choices(self) -> list[Any]:
        return [self.schema["const"]] if "const" in self.schema else list(self.schema.get("enum") or [])

    @property
    def fewest_chars(self) -> int:
        """A lower bound on the length of a text that the schema allows, from its choices, minItems and minLength."""
        if self.kind == "choice":
            return min(len(_spelling(choice)) for choice in self.choices)
        items = self.schema.get("minItems", 0) if self.kind in ("list", "json") else 0
        return max(2 * items, self.schema.get("minLength", 0) if self.kind == "string" else 0)

    def words(self) -> str:
        """Return what a value must be: "a whole number from 0 to 6"."""
        match self.kind:
            case "choice":
                return f"one of {named(self.choices)}"
            case "integer":
                return f"a whole number{self._bounds()}"
            case "number":
                return f"a number{self._bounds()}"
            case "boolean":
                return "true or false"
            case "list":
                return f"a list of numbers{self._length()}, such as [0.5, 1]"
            case "string":
                return f"a text{self._length()}"
        kinds = self.schema.get("type", "any")
        return f"JSON of type {' or '.join(kinds) if isinstance(kinds, list) else kinds}"

    def read(self, text: str) -> Any:
        """Return the value that a text means; InvalidAction says what is expected. Bounds are not checked here."""
        match self.kind:
            case "string":
                return text
            case "choice":
                return self._choice(text)
            case "integer" if INTEGER.fullmatch(text):
                return int(text)
            case "number" if NUMBER.fullmatch(text) and math.isfinite(float(text)):
                return float(text)
            case "boolean" if text.lower() in BOOLEANS:
                return BOOLEANS[text.lower()]
            case "list":
                return json_value(text if text.startswith("[") else f"[{','.join(SEPARATORS.split(text))}]")
            case "json":
                return json_value(text)
        raise InvalidAction(f"{text[:50]!r} is not {self.words()}.")

    def drawn(self, random: Random) -> Any:
        """Return a random value; it keeps the schema's simple keywords (bounds, lengths, enum) only."""
        match self.kind:
            case "choice":
                short = [choice for choice in self.choices if len(_spelling(choice)) <= MAX_WRITTEN_CHARS]
                return random.choice(short or self.choices)
            case "integer":
                low, high = _finite(*_bounds(self.schema), width=9)
                return random.randint(math.ceil(low), max(math.floor(high), math.ceil(low)))
            case "number":
                return round(random.uniform(*_finite(*_bounds(self.schema), width=2)), 3)
            case "boolean":
                return random.random() < 0.5
            case "list":
                length = max(self.schema.get("minItems", 0), min(3, self.schema.get("maxItems", 3)))
                items = Field.of("", self.schema["items"], {}, required=True)
                return [items.drawn(random) for _ in range(length)]
            case "string" if self.hints and random.random() < 0.8:
                return random.choice(self.hints)
            case "string":
                length = max(self.schema.get("minLength", 0), 1)
                words = " ".join(random.choices(WORDS, k=random.randint(1, 5)))
                return words.ljust(length, "x")[: self.schema.get("maxLength", 1000)]
        kinds = self.schema.get("type", "object")
        drawn = {"array": [], "string": "", "integer": 0, "number": 0, "boolean": True, "null": None}
        return drawn.get(kinds[0] if isinstance(kinds, list) else kinds, {})

    def _choice(self, text: str) -> Any:
        spelled = text.strip("\"'")
        for same in (str.__eq__, lambda a, b: a.lower() == b.lower()):
            found = [choice for choice in self.choices if same(_spelling(choice), spelled)]
            if len(found) == 1:
                return found[0]
        raise InvalidAction(f"{text[:50]!r} is not {self.words()}.")

    def _bounds(self) -> str:
        low, high = _bounds(self.schema)
        if math.isfinite(low) and math.isfinite(high):
            return f" from {low:g} to {high:g}"
        if math.isfinite(low):
            return f" of at least {low:g}"
        return f" of at most {high:g}" if math.isfinite(high) else ""

    def _length(self) -> str:
        unit = "numbers" if self.kind == "list" else "characters"
        low = self.schema.get("minItems", self.schema.get("minLength"))
        high = self.schema.get("maxItems", self.schema.get("maxLength"))
        if low is None and high is None:
            return ""
        if low == high:
            return f" ({low} {unit})"
        return f" ({low or 0} to {high} {unit})" if high is not None else f" (at least {low} {unit})"


def named(values: Sequence[Any]) -> str:
    """Return the values as "a, b, c", cut after MAX_SHOWN_CHOICES of them."""
    shown = ", ".join(_spelling(value)[:60] for value in values[:MAX_SHOWN_CHOICES])
    return shown if len(values) <= MAX_SHOWN_CHOICES else f"{shown}, ... ({len(values)} in all)"


def _spelling(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _hints(schema: dict[str, Any], root: dict[str, Any]) -> tuple[str, ...]:
    examples = schema.get("examples")
    words = [example for example in examples if isinstance(example, str)] if isinstance(examples, list) else []
    for described in (schema, root):
        words += QUOTED.findall(str(described.get("description", ""))[:MAX_HINTED_CHARS])
    return tuple(dict.fromkeys(words))[:MAX_SHOWN_CHOICES]


def _kind(schema: dict[str, Any], root: dict[str, Any]) -> str:
    if schema.get("enum") or "const" in schema:
        return "choice"
    kind = schema.get("type")
    if kind == "array":
        items = resolved(schema.get("items") or {}, root)
        return "list" if items.get("type") in ("integer", "number") and not items.get("enum") else "json"
    return kind if kind in ("string", "integer", "number", "boolean") else "json"


def _bounds(schema: dict[str, Any]) -> tuple[float, float]:
    low = _number(schema.get("minimum", schema.get("exclusiveMinimum", -math.inf)))
    high = _number(schema.get("maximum", schema.get("exclusiveMaximum", math.inf)))
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def _number(given: int | float) -> int | float:
    """Return the number, infinite where a whole one is too large for arithmetic with others."""
    try:
        float(given)
    except OverflowError:
        return math.inf if given > 0 else -math.inf
    return given


def _finite(low: float, high: float, *, width: float) -> tuple[float, float]:
    """Return finite bounds to draw between: around 0, or `width` from the only finite one."""
    low, high = (-math.inf if low == math.inf else low), (math.inf if high == -math.inf else high)
    if math.isinf(low) and math.isinf(high):
        return (0, width) if width > 2 else (-1, 1)
    return (high - width, high) if math.isinf(low) else (low, low + width) if math.isinf(high) else (low, high)
