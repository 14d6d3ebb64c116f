"""Forms of actions as text, derived from the JSON schema of a server's actions.

{"move": string}                      the text itself                     <action>e2e4</action>
{"column": integer}                   a whole number, a legal one         <action>3</action>
{"values": array of numbers}          a list                              <action>[0.5, -1]</action>
{"action": enum}                      one of its names                    <action>UP</action>
several fields                        a JSON object                       <action>{"action": "water", "x": 3}</action>
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from random import Random
from typing import Any

from integrations.openenv.catalog.entry import InvalidAction
from integrations.openenv.catalog.generic.validation import ActionSchema, json_value
from integrations.openenv.catalog.generic.values import MAX_WRITTEN_CHARS, Field, Legal, named
from integrations.openenv.client.errors import OpenEnvError
from skyrl_gym.tool_calls import ToolCall

NOT_THE_POLICYS = {"metadata"}  # a field of every action in OpenEnv that a policy does not write
MAX_FIELDS_SHOWN = 30
ACT = "act"  # the function that stands for an action which is no call of a tool
MAX_DESCRIPTION_CHARS = 200


class ActionForm(ABC):
    """One way to write actions. `legal`: the actions that the last observation allows; None if it does not say."""

    kind: str  # for reports

    @abstractmethod
    def how(self) -> str:
        """Return what to write between the tags, for the prompt."""

    @abstractmethod
    def fields(self, text: str, legal: Legal | None) -> dict[str, Any]:
        """Return the fields of the action; InvalidAction says what is wrong and what is expected."""

    @abstractmethod
    def random_text(self, random: Random, legal: Legal | None) -> str:
        """Return a random action in this form."""

    # The same as calls of functions

    @abstractmethod
    def functions(self) -> list[dict[str, Any]]:
        """Return the schemas of the functions that stand for actions, in OpenAI's form."""

    @abstractmethod
    def called(self, name: Any, arguments: Any, legal: Legal | None) -> dict[str, Any]:
        """Return the fields of the action that a call means; InvalidAction says what is wrong."""

    @abstractmethod
    def random_call(self, random: Random, legal: Legal | None) -> ToolCall:
        """Return a random action as a call."""


class ObjectForm(ActionForm):
    """Form of an action with several fields: a JSON object."""

    kind = "a JSON object"

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = {**schema, "properties": _without_metadata(schema)}
        self._schema = ActionSchema(self.schema)
        self.members = members(schema)
        for name in schema.get("required") or []:
            if name not in {field.name for field in self.members} | NOT_THE_POLICYS:
                raise OpenEnvError(f"the server's schema requires a field {name[:50]!r} that it does not describe")
        for field in self.members:
            if field.required and field.fewest_chars > MAX_WRITTEN_CHARS:
                raise OpenEnvError(
                    f"the server's schema requires {field.words()} in {field.name[:50]!r}, and nobody can write that: "
                    f"an action has at most {MAX_WRITTEN_CHARS} characters"
                )

    def how(self) -> str:
        shown = self.members[:MAX_FIELDS_SHOWN]
        return "a JSON object with these fields:\n" + "\n".join(_line(field) for field in shown)

    def fields(self, text: str, legal: Legal | None) -> dict[str, Any]:
        value = json_value(text)
        if not isinstance(value, dict):
            raise InvalidAction(f"Your action is not a JSON object. It must be {self.how()}")
        return self.complete(value)

    def complete(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the fields, with the schema's defaults for those left out; InvalidAction if they break the schema."""
        for name in value:
            if name not in {field.name for field in self.members}:
                raise InvalidAction(
                    f"There is no field {name[:50]!r}; there are {named([f.name for f in self.members])}."
                )
        self._schema.check(value)
        defaults = {f.name: f.schema["default"] for f in self.members if "default" in f.schema and not f.required}
        return {**defaults, **value}

    def functions(self) -> list[dict[str, Any]]:
        return [function_schema(ACT, "Act in the environment.", self)]

    def called(self, name: Any, arguments: Any, legal: Legal | None) -> dict[str, Any]:
        if name != ACT:
            raise InvalidAction(f"The only tool is {ACT}.")
        if not isinstance(arguments, dict):
            raise InvalidAction(f'"arguments" must be {self.how()}')
        return self.complete(arguments)

    def random_call(self, random: Random, legal: Legal | None) -> ToolCall:
        return ToolCall(ACT, json.loads(self.random_text(random, legal)))

    def random_text(self, random: Random, legal: Legal | None) -> str:
        writable = [field for field in self.members if field.fewest_chars <= MAX_WRITTEN_CHARS]
        given = [field for field in writable if field.required or random.random() < 0.5]
        return json.dumps({field.name: field.drawn(random) for field in given})


class ValueForm(ActionForm):
    """Form of an action with one required field: its value alone, or the JSON object to set other fields too."""

    def __init__(self, form: ObjectForm, field: Field) -> None:
        self.field = field
        self.object = form
        self.others = [other for other in self.object.members if other.name != field.name]
        self.kind = field.words()

    def how(self) -> str:
        description = _described(self.field)
        words = (
            f"{self.field.words()}, the {self.field.name.replace('_', ' ')}{f' ({description})' if description else ''}"
        )
        if not self.others:
            return words
        lines = "\n".join(_line(field) for field in self.object.members[:MAX_FIELDS_SHOWN])
        return f"{words}. To set other fields as well, write a JSON object instead, with these fields:\n{lines}"

    def fields(self, text: str, legal: Legal | None) -> dict[str, Any]:
        text = text.strip()
        if not text:
            raise InvalidAction(f"Your action is empty. Write {self.field.words()}.")
        if self.others and text.startswith("{"):
            fields = self.object.fields(text, legal)
        else:
            fields = self.object.complete({self.field.name: self.field.read(text)})
        self._require_legal(fields[self.field.name], legal)
        return fields

    def functions(self) -> list[dict[str, Any]]:
        return self.object.functions()

    def called(self, name: Any, arguments: Any, legal: Legal | None) -> dict[str, Any]:
        fields = self.object.called(name, arguments, legal)
        self._require_legal(fields[self.field.name], legal)
        return fields

    def random_call(self, random: Random, legal: Legal | None) -> ToolCall:
        return ToolCall(ACT, {self.field.name: self._random_value(random, legal)})

    def random_text(self, random: Random, legal: Legal | None) -> str:
        if self.others and self.field.kind == "string" and random.random() < 0.5:
            return self.object.random_text(random, legal)
        value = self._random_value(random, legal)
        return value if isinstance(value, str) else json.dumps(value)

    def _random_value(self, random: Random, legal: Legal | None) -> Any:
        return random.choice(legal) if legal and self._names_values(legal) else self.field.drawn(random)

    def _require_legal(self, value: Any, legal: Legal | None) -> None:
        if legal and self._names_values(legal) and value not in legal:
            raise InvalidAction(f"{str(value)[:50]!r} is not legal now. Legal: {named(legal)}.")

    def _names_values(self, legal: Legal) -> bool:
        """Return whether the legal actions are values of this field; names of moves are not values of an integer."""
        wanted = {"integer": int, "string": str}.get(self.field.kind)
        return wanted is not None and all(isinstance(value, wanted) for value in legal)


def action_form(schema: dict[str, Any]) -> ActionForm:
    """Return the form for an action's schema: ValueForm for one required field, ObjectForm for several."""
    form = ObjectForm(schema)
    fields = form.members
    required = [field for field in fields if field.required] or fields
    if len(required) == 1 and required[0].kind != "json" and required[0].fewest_chars <= MAX_WRITTEN_CHARS:
        return ValueForm(form, required[0])
    return form


def function_schema(name: str, description: str, arguments: ObjectForm) -> dict[str, Any]:
    """Return a function's schema in OpenAI's form."""
    function = {"name": name, "description": description, "parameters": arguments.schema}
    return {"type": "function", "function": function}


def members(schema: dict[str, Any]) -> list[Field]:
    """Return the fields that a policy may set."""
    required = schema.get("required") or []
    return [
        Field.of(name, value, schema, required=name in required) for name, value in _without_metadata(schema).items()
    ]


def _without_metadata(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    return {name: value for name, value in properties.items() if name not in NOT_THE_POLICYS}


def _line(field: Field) -> str:
    default = "" if field.required else f", {json.dumps(field.schema.get('default'))[:50]} if left out"
    description = _described(field)
    return f"- {json.dumps(field.name)}: {field.words()}{default}{f'. {description}' if description else ''}"


def _described(field: Field) -> str:
    description = field.schema.get("description")
    return " ".join(description.split())[:MAX_DESCRIPTION_CHARS] if isinstance(description, str) else ""
