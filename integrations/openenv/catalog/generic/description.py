"""A running server's description of itself: GET /schema and /metadata, and the tools of an MCP environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from integrations.openenv.catalog.entry import OpenSession
from integrations.openenv.catalog.generic.actions import ActionForm, action_form
from integrations.openenv.catalog.generic.tools import Tool, ToolForm, call_constants, calls_tools
from integrations.openenv.catalog.generic.validation import ActionSchema
from integrations.openenv.client.addresses import fetch_json, schema
from integrations.openenv.client.errors import OpenEnvError

MAX_MANUAL_CHARS = 2000


@dataclass(frozen=True, slots=True)
class ServerDescription:
    """The description of one environment by its server."""

    title: str
    manual: str  # the description in its action's schema; may be empty
    form: ActionForm
    action_schema: dict[str, Any]
    observation_schema: dict[str, Any]


async def describe(session: OpenSession) -> ServerDescription:
    """Ask the session's server for its description; OpenEnvError if no actions can be derived from it."""
    url = session.url
    try:
        schemas = await schema(url)
    except OpenEnvError as silent:
        raise OpenEnvError(
            f"{silent}; an environment outside the catalog is read from its /schema, which servers of openenv 0.2.0 "
            "and later have"
        ) from silent
    action, observation = schemas.get("action"), schemas.get("observation")
    if not isinstance(action, dict) or not isinstance(action.get("properties"), dict):
        raise OpenEnvError(f"{url}/schema gives no properties of an action: {str(schemas)[:200]}")
    observation = observation if isinstance(observation, dict) else {}
    ActionSchema(action)  # checks the schema: below, its keywords have the types that JSON schema gives them
    if calls_tools(action):
        form: ActionForm = ToolForm(await list_tools(session), call_constants(action))
        manual = ""  # the schema describes tool calls in general, not this environment
    else:
        form = action_form(action)
        manual = _manual(action)
    return ServerDescription(await _title(url), manual, form, action, observation)


async def list_tools(session: OpenSession) -> list[Tool]:
    tools = (await session.mcp("tools/list", {})).get("tools")
    if not isinstance(tools, list):
        raise OpenEnvError(f"{session.url}: tools/list gave {str(tools)[:200]}")
    return [Tool.from_fields(fields) for fields in tools]


async def _title(url: str) -> str:
    """Return the environment's own name, such as GridWorldEnvironment; "" if it has none."""
    try:
        name = (await fetch_json(url, "/metadata", 10.0)).get("name")
    except OpenEnvError:  # an optional route
        return ""
    return name[:100] if isinstance(name, str) else ""


def _manual(schema: dict[str, Any]) -> str:
    description = schema.get("description")
    return description.strip()[:MAX_MANUAL_CHARS] if isinstance(description, str) else ""
