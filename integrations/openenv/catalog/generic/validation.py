"""Reader of a model's JSON, and its validation by a schema that a server sent. Neither is trusted."""

from __future__ import annotations

import json
import math
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable

from integrations.openenv.catalog.entry import InvalidAction
from integrations.openenv.client.errors import OpenEnvError
from skyrl_gym.tool_calls import nests_deeper

MAX_DEPTH = 30
MAX_COMPLAINT_CHARS = 300
# The server checks these itself; here a model's text could make them take minutes.
NOT_CHECKED = {"pattern", "patternProperties", "format", "uniqueItems"}


class ActionSchema:
    """Validator of actions by a server's JSON schema. Fields that it does not name are always refused."""

    def __init__(self, schema: dict[str, Any]) -> None:
        cleaned = _cleaned(schema, MAX_DEPTH)
        if cleaned.get("properties") is not None:
            cleaned["additionalProperties"] = False
        try:
            Draft202012Validator.check_schema(cleaned)
        except SchemaError as wrong:
            raise OpenEnvError(f"the server's schema is not a JSON schema: {wrong.message[:200]}") from wrong
        self._validator = Draft202012Validator(cleaned, registry=Registry())  # an empty registry fetches nothing

    def check(self, value: Any) -> None:
        """Raise InvalidAction, with the most relevant error, unless the value is an action."""
        try:
            worst = best_match(self._validator.iter_errors(value))
        except Unresolvable as missing:
            message = str(missing)[:MAX_COMPLAINT_CHARS]  # it may quote the whole schema
            raise OpenEnvError(f"the server's schema refers to what is not in it: {message}") from missing
        except RecursionError:
            raise InvalidAction("Your action is nested too deeply.") from None
        if worst is not None:
            where = ".".join(map(str, worst.absolute_path))
            message = f"{where}: {worst.message}" if where else worst.message
            raise InvalidAction(f"{message[:MAX_COMPLAINT_CHARS]}.")


def json_value(text: str) -> Any:
    """Return the JSON value that a model wrote; InvalidAction if it is none, or one that cannot be sent."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is JSON, but no text
    except UnicodeEncodeError:
        raise InvalidAction("Your action holds a character that is no text.") from None
    except RecursionError:
        raise InvalidAction("Your action is nested too deeply.") from None
    except ValueError as wrong:
        raise InvalidAction(f"Your action is not JSON: {wrong}.") from None
    if nests_deeper(value, MAX_DEPTH):
        raise InvalidAction("Your action is nested too deeply.")
    return value


def sendable(value: Any) -> Any:
    """Return a JSON value of a model's; InvalidAction if it cannot be sent."""
    try:
        return json_value(json.dumps(value))
    except RecursionError:
        raise InvalidAction("Your action is nested too deeply.") from None


def resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its "#/..." reference followed and "this or null" reduced to "this".

    Keywords beside a reference, such as a description, are kept. root: the schema that references point into.
    """
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict):
            return {}
        if isinstance(schema.get("type"), list):
            kinds = [kind for kind in schema["type"] if kind != "null"] or ["null"]
            schema = {**schema, "type": kinds[0] if len(kinds) == 1 else kinds}
        reference = schema.get("$ref")
        if isinstance(reference, str):
            target, beside = _pointed_at(reference, root), {k: v for k, v in schema.items() if k != "$ref"}
        else:
            options = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
            meant = [option for option in options or [] if not _is_null(option)]
            if len(meant) != 1:
                return schema
            target = meant[0]
            beside = {k: v for k, v in schema.items() if k not in ("anyOf", "oneOf", "allOf")}
        schema = {**target, **beside} if isinstance(target, dict) else beside
    return {}


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and (schema.get("type") in ("null", ["null"]) or schema.get("const", "") is None)


def _pointed_at(reference: str, root: dict[str, Any]) -> Any:
    node: Any = root
    for step in reference.removeprefix("#/").split("/"):
        node = node.get(step) if isinstance(node, dict) else None
    return node


def _cleaned(schema: Any, depth: int) -> Any:
    if depth == 0:
        raise OpenEnvError("the server's schema is nested too deeply")
    if isinstance(schema, dict):
        return {key: _cleaned(value, depth - 1) for key, value in schema.items() if not _is_left_out(key, value)}
    return [_cleaned(item, depth - 1) for item in schema] if isinstance(schema, list) else schema


def _is_left_out(key: str, value: Any) -> bool:
    """Return whether a keyword is not checked; a property called "pattern" has a schema as its value and is kept."""
    return key in NOT_CHECKED and (not isinstance(value, dict) or key == "patternProperties")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that can be sent")
    return number
