"""OpenAI's chat completions and completions: what a client sends, checked. replies.py has what it gets back."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skyrl_gym.contract import WrongAnswer, checked_tool_schemas
from skyrl_train.types import Message
from skyrl_train.visible import shortened

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class BadRequest(ValueError):
    """A request that is refused with status 400. `code` is OpenAI's word for the reason, where it has one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        return error_body(str(self), "invalid_request_error", self.param, self.code)


class Body(BaseModel):
    """The fields that both kinds of request share. Null is the same as not given; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")
    # Fields that change what is asked for, with the values that ask for nothing we lack.
    only: ClassVar[dict[str, tuple[Any, ...]]] = {"n": (None, 1), "best_of": (None, 1), "logit_bias": (None, {})}

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = None  # vLLM's names from here; of a session only the run's own sampling is read
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    seed: int | None = None
    return_token_ids: bool | None = None  # vLLM's name: add prompt_token_ids and token_ids to the answer
    return_tokens_as_token_ids: bool | None = None  # vLLM's name: logprobs name a token by its id, "token_id:7"

    @property
    def longest_reply(self) -> int | None:
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatBody(Body):
    """A request for the next message of a conversation."""

    only = Body.only | {
        "tool_choice": (None, "auto", "none"),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
        "top_logprobs": (None, 0, 1),  # 1: the token that was sampled, as only its logprob is known
        "audio": (None,),
    }

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[Any] | None = None
    tool_choice: str | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def longest_reply(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Return the tools that the model may call. BadRequest for what is no function."""
        try:
            return checked_tool_schemas(None if self.tool_choice == "none" else self.tools)
        except WrongAnswer as wrong:
            raise BadRequest(str(wrong).replace("tool_schemas", "tools"), param="tools") from None

    @property
    def plain_messages(self) -> list[Message]:
        """Return role, text and calls of tools of each message. BadRequest for what is no text."""
        return [_plain(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


class TextBody(Body):
    """A request for what follows a text, or token ids."""

    only = Body.only | {"echo": (None, False), "suffix": (None, "")}

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def one_prompt(self) -> str | list[int]:
        """Return the only prompt, text or token ids. BadRequest for several."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and all(isinstance(token, int) for token in self.prompt):
            return [token for token in self.prompt if isinstance(token, int)]
        if len(self.prompt) != 1 or isinstance(self.prompt[0], int):
            raise BadRequest(f"one prompt a request, got {len(self.prompt)}; send the others apart", param="prompt")
        return self.prompt[0]


def read_body(kind: type[Body], raw: bytes) -> Any:
    """Return a checked request. BadRequest says which field is wrong, or which is asked for and not supported."""
    try:
        fields = json.loads(raw)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # "\\ud800" is valid JSON and no text that a tokenizer takes
        raise BadRequest(f"the body holds half of a surrogate pair: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, got a {type(fields).__name__}")
    for name, accepted in kind.only.items():
        if fields.get(name) not in accepted:
            others = [json.dumps(value) for value in accepted if value is not None]
            instead = " or send ".join(["leave it out", *others])
            asked = shortened(json.dumps(fields[name], ensure_ascii=False), 100)
            raise BadRequest(f"{name}={asked} is not supported; {instead}", param=name)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{place}: {first['msg']}", param=place or None) from None


def _plain(message: dict[str, Any], place: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRequest(f"{place}.role must be one of {', '.join(ROLES)}, got {role!r}", param=place)
    if message.get("function_call"):
        raise BadRequest(f"{place}: function_call is not supported; use tool_calls", param=place)
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"{place}.content must be a text or a list of text parts", param=place)
    plain: Message = {"role": str(role), "content": "".join(text for text in texts if isinstance(text, str))}
    if isinstance(message.get("tool_call_id"), str):
        plain["tool_call_id"] = message["tool_call_id"]
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = _plain_calls(calls, f"{place}.tool_calls")
    return plain


def _plain_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return calls of tools as chat templates read them: with their arguments as an object, not as a text."""
    return [_plain_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]


def _plain_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        read = None
    if not isinstance(name, str) or not isinstance(read, dict):
        raise BadRequest(f"{place} must be functions with a name and arguments, a JSON object as text", param=place)
    return {"id": str(call.get("id")), "type": "function", "function": {"name": name, "arguments": read}}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
