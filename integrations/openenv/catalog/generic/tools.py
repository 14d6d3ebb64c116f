"""Tools of an MCP environment: shown to the model as functions, called by a JSON object.

<action>{"tool": "echo_message", "arguments": {"message": "hello"}}</action>
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any, Self

from integrations.openenv.catalog.entry import InvalidAction
from integrations.openenv.catalog.generic.actions import ActionForm, ObjectForm, function_schema
from integrations.openenv.catalog.generic.validation import json_value
from integrations.openenv.catalog.generic.values import Legal, named
from integrations.openenv.client.errors import OpenEnvError
from skyrl_gym.tool_calls import ToolCall

MAX_TOOLS = 50
MAX_DESCRIPTION_CHARS = 300
NAME_KEYS, ARGUMENT_KEYS = ("tool", "name", "tool_name"), ("arguments", "args", "parameters")


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the environment offers."""

    name: str
    description: str
    arguments: ObjectForm

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Read one item of the answer to tools/list; OpenEnvError if it has no name or schema."""
        schema = fields.get("inputSchema", fields.get("input_schema")) if isinstance(fields, dict) else None
        if not isinstance(schema, dict) or not isinstance(fields.get("name"), str):
            raise OpenEnvError(f"the server lists a tool without a name and a schema: {str(fields)[:200]}")
        description = " ".join(str(fields.get("description") or "").split())[:MAX_DESCRIPTION_CHARS]
        return cls(fields["name"], description, ObjectForm({"properties": {}, **schema}))

    def line(self) -> str:
        arguments = ", ".join(
            f"{field.name}{'' if field.required else '?'}: {field.words()}" for field in self.arguments.members
        )
        return f"- {self.name}({arguments}){f': {self.description}' if self.description else ''}"

    def schema(self) -> dict[str, Any]:
        return function_schema(self.name, self.description, self.arguments)


class ToolForm(ActionForm):
    """Form of an action that calls a tool. `constants`: the fields of every call besides its tool and arguments."""

    kind = "a call of a tool"

    def __init__(self, tools: list[Tool], constants: dict[str, Any]) -> None:
        if not tools:
            raise OpenEnvError("the server's actions are calls of tools, but it lists no tool")
        self.tools = {tool.name: tool for tool in tools[:MAX_TOOLS]}
        self.constants = constants

    def how(self) -> str:
        lines = "\n".join(tool.line() for tool in self.tools.values())
        return f'a JSON object {{"tool": NAME, "arguments": {{...}}}} that calls one of these tools:\n{lines}'

    def fields(self, text: str, legal: Legal | None) -> dict[str, Any]:
        call = json_value(text)
        if not isinstance(call, dict):
            raise InvalidAction(f"Your action is not a JSON object. It must be {self.how()}")
        rest = dict(call)
        name = next((rest.pop(key) for key in NAME_KEYS if key in call), None)
        arguments = next((rest.pop(key) for key in ARGUMENT_KEYS if key in call), {})
        if rest:
            raise InvalidAction(f'Beside "tool" and "arguments" there is {named(list(rest))}, which has no meaning.')
        return self.called(name, arguments, legal)

    def called(self, name: Any, arguments: Any, legal: Legal | None) -> dict[str, Any]:
        if not isinstance(name, str) or name not in self.tools:
            raise InvalidAction(f'"tool" must be one of {named(list(self.tools))}.')
        if not isinstance(arguments, dict):
            raise InvalidAction(f'"arguments" must be a JSON object, for {self.tools[name].line()[2:]}')
        try:
            complete = self.tools[name].arguments.complete(arguments)
        except InvalidAction as wrong:
            raise InvalidAction(f"{name}: {wrong}") from None
        return {**self.constants, "tool_name": name, "arguments": complete}

    def functions(self) -> list[dict[str, Any]]:
        return [tool.schema() for tool in self.tools.values()]

    def random_call(self, random: Random, legal: Legal | None) -> ToolCall:
        tool = random.choice(list(self.tools.values()))
        return ToolCall(tool.name, json.loads(tool.arguments.random_text(random, None)))

    def random_text(self, random: Random, legal: Legal | None) -> str:
        call = self.random_call(random, legal)
        return json.dumps({"tool": call.name, "arguments": call.arguments})


def calls_tools(schema: dict[str, Any]) -> bool:
    """Return whether an action's schema is that of a tool call."""
    properties = schema.get("properties") or {}
    others = set(schema.get("required") or []) - {"type", "tool_name", "arguments"}
    return {"tool_name", "arguments"} <= set(properties) and not others


def call_constants(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the schema fixes for every call: {"type": "call_tool"}, or {}."""
    kind = (schema.get("properties") or {}).get("type")
    return {"type": kind["const"]} if isinstance(kind, dict) and "const" in kind else {}
