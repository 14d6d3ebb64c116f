"""The echo environment's server: it returns the message that it is sent.

It has the official image's wire format: the tools echo_message(message) and echo_with_length(message), called with
{"type": "call_tool", "tool_name": ..., "arguments": {...}}, reward None, never done. The older form {"message": ...}
is also accepted and answered as those servers did: echoed_message, message_length and reward 0.1 per character.
"""

from __future__ import annotations

import json
import uuid
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastmcp import FastMCP
from openenv.core.env_server import Action, Observation, State, create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation, ListToolsAction
from pydantic import ConfigDict

from integrations.openenv.servers.serving import serve


class MessageAction(Action):
    """An action in the form of servers before 2026."""

    message: str


class MessageObservation(Observation):
    """The answer to a MessageAction."""

    echoed_message: str
    message_length: int


class EchoAction(CallToolAction):
    """Parses a frame as one of the three actions; its schema is that of a tool call."""

    model_config = ConfigDict(title="CallToolAction")

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Any:
        if isinstance(obj, dict) and "message" in obj:
            return MessageAction.model_validate(obj, **kwargs)
        if isinstance(obj, dict) and obj.get("type") == "list_tools":
            return ListToolsAction.model_validate(obj, **kwargs)
        return CallToolAction.model_validate(obj, **kwargs)


def echo_message(message: str) -> str:
    """Echo the message back."""
    return message


def echo_with_length(message: str) -> dict[str, Any]:
    """Echo the message back, with its length."""
    return {"message": message, "length": len(message)}


TOOLS = {"echo_message": echo_message, "echo_with_length": echo_with_length}


class EchoEnvironment(MCPEnvironment):
    """Two tools and a step count.

    A valid call is answered here, in FastMCP's form and in a tenth of its time; FastMCP answers an invalid one.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__(_tool_server())
        self._state = State(episode_id=str(uuid.uuid4()))

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
        self._state = State(episode_id=episode_id or str(uuid.uuid4()))
        return Observation(done=False, reward=0.0, metadata={"status": "ready"})

    async def step_async(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        self._state.step_count += 1
        if isinstance(action, MessageAction):
            return self._step_impl(action)
        if isinstance(action, CallToolAction) and _is_right(action):
            return CallToolObservation(tool_name=action.tool_name, result=_result(action))
        return await super().step_async(action, timeout_s=timeout_s, **kwargs)

    def step(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        self._state.step_count += 1
        return super().step(action, timeout_s=timeout_s, **kwargs)

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        if not isinstance(action, MessageAction):
            raise ValueError(f"echo_env knows tool calls and messages, not {type(action).__name__}")
        length = len(action.message)
        return MessageObservation(echoed_message=action.message, message_length=length, reward=0.1 * length)

    @property
    def state(self) -> State:
        return self._state


@cache
def _tool_server() -> FastMCP:
    """Return one server for all sessions, because the tools have no state."""
    server = FastMCP("echo_env")
    for tool in TOOLS.values():
        server.tool(tool)
    return server


def _is_right(action: CallToolAction) -> bool:
    return (
        action.tool_name in TOOLS and [*map(type, action.arguments.values())] == [str] and "message" in action.arguments
    )


def _result(action: CallToolAction) -> dict[str, Any]:
    """Return the result of a tool as text and as data. MCP wraps a result that is no object: {"result": ...}."""
    returned = TOOLS[action.tool_name](**action.arguments)
    is_object = isinstance(returned, dict)
    text = json.dumps(returned, ensure_ascii=False, separators=(",", ":")) if is_object else returned
    return {
        "content": [{"type": "text", "text": text, "annotations": None, "meta": None}],
        "structured_content": returned if is_object else {"result": returned},
        "meta": None,
        "data": returned,
        "is_error": False,
    }


def make_app(max_sessions: int) -> FastAPI:
    return create_app(
        EchoEnvironment, EchoAction, CallToolObservation, env_name="echo_env", max_concurrent_envs=max_sessions
    )


if __name__ == "__main__":
    serve(make_app, "The echo environment of OpenEnv, without Docker.")
