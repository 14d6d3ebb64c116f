"""OpenAI's answers: a completion as a whole, or as the events of a stream while it is being sampled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from skyrl_gym.tool_calls import ToolCall, UnreadableCall, read_tool_calls, without_tool_calls
from skyrl_train.engine.base import Completion
from skyrl_train.rollout.agents.openai_api import Body, ChatBody
from skyrl_train.rollout.agents.streaming import Partial, ShownText, cut_at_stop

DONE = "data: [DONE]\n\n"


def said_in(text: str, *, may_call: bool) -> tuple[str, list[ToolCall]]:
    """Return the words of a reply, and its calls of tools if it could make any. Calls that cannot be read are words."""
    try:
        calls = read_tool_calls(text) if may_call else []
    except UnreadableCall:
        calls = []
    return (without_tool_calls(text), calls) if calls else (text, [])


def sse_event(fields: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"


class Reply:
    """The answer to one request. It is made before anything is sampled; all that it says carries the same id."""

    def __init__(
        self,
        body: Body,
        number: int,
        model: str,
        prompt_ids: list[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        may_call: bool,
    ) -> None:
        self._body, self._number, self._prompt_ids, self._tokenizer = body, number, prompt_ids, tokenizer
        self._may_call, self._is_chat = may_call, isinstance(body, ChatBody)
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{number}",
            "created": int(time.time()),
            "model": model,
        }
        self._kind = "chat.completion" if self._is_chat else "text_completion"
        self._shown = ShownText(tokenizer, body.stops)
        self._num_sent: int | None = None  # tokens in the events so far; None before the first

    def whole(self, completion: Completion) -> dict[str, Any]:
        """Return the body of the answer."""
        words, calls = self._said(completion)
        said = {"message": _message(words, calls)} if self._is_chat else {"text": words}
        token_ids = {"prompt_token_ids": self._prompt_ids} if self._body.return_token_ids else {}
        choice = self._choice(said, completion.response_ids, completion.logprobs, _finish(completion, calls))
        return {
            **self._head,
            "object": self._kind,
            "choices": [choice],
            "usage": self._usage(completion),
            **token_ids,
        }

    def news(self, partial: Partial) -> Iterator[str]:
        """Yield the event that shows more of a reply, if more of it may be shown.

        Whether a reply calls tools is known when it is whole; where it may, it is shown then.
        """
        text = "" if self._may_call else self._shown.news(partial.response_ids)
        if text:
            yield self._chunk(self._delta(text), partial.response_ids, partial.logprobs)

    def end(self, completion: Completion) -> Iterator[str]:
        """Yield the last events: the rest of the text, the calls of tools, why it ended, and what it cost."""
        ids, logprobs = completion.response_ids, completion.logprobs
        words, calls = self._said(completion)
        text = words if self._may_call else self._shown.rest(completion.text)
        if text or calls or self._num_sent is None:
            numbered = [{"index": place, **call} for place, call in enumerate(calls)]
            yield self._chunk(self._delta(text, numbered), ids, logprobs)
        end: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        yield self._chunk(end, ids, logprobs, _finish(completion, calls))
        if (self._body.stream_options or {}).get("include_usage"):
            yield self._event({"choices": [], "usage": self._usage(completion)})
        yield DONE

    def _said(self, completion: Completion) -> tuple[str, list[dict[str, Any]]]:
        words, calls = said_in(cut_at_stop(completion.text, self._body.stops), may_call=self._may_call)
        return words, [_call_body(call, f"call_{self._number}_{place}") for place, call in enumerate(calls)]

    def _delta(self, text: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": text}
        return {"delta": _message(text, calls or []) if self._num_sent is None else {"content": text}}

    def _chunk(
        self, said: dict[str, Any], ids: list[int], logprobs: list[float], finish_reason: str | None = None
    ) -> str:
        """Return an event with what is said and the tokens that were sampled since the last one."""
        sent = self._num_sent or 0
        is_first, self._num_sent = self._num_sent is None, len(ids)
        first = {"prompt_token_ids": self._prompt_ids} if is_first and self._body.return_token_ids else {}
        return self._event({"choices": [self._choice(said, ids[sent:], logprobs[sent:], finish_reason)], **first})

    def _event(self, fields: dict[str, Any]) -> str:
        return sse_event({**self._head, "object": "chat.completion.chunk" if self._is_chat else self._kind, **fields})

    def _usage(self, completion: Completion) -> dict[str, int]:
        prompt, reply = len(self._prompt_ids), len(completion.response_ids)
        return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}

    def _choice(
        self, said: dict[str, Any], ids: list[int], logprobs: list[float], finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": 0, **said, "finish_reason": finish_reason, "logprobs": None}
        if self._body.wants_logprobs:
            by_id = self._body.return_tokens_as_token_ids
            tokens = [f"token_id:{token}" if by_id else str(self._tokenizer.decode([token])) for token in ids]
            with_top = isinstance(self._body, ChatBody) and self._body.top_logprobs == 1
            choice["logprobs"] = (
                _chat_logprobs(tokens, logprobs, with_top=with_top)
                if self._is_chat
                else _text_logprobs(tokens, logprobs)
            )
        if self._body.return_token_ids:
            choice["token_ids"] = ids
        return choice


def _message(words: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    said = {"role": "assistant", "content": words}
    return {**said, "content": words or None, "tool_calls": calls} if calls else said


def _finish(completion: Completion, calls: list[dict[str, Any]]) -> str:
    return "tool_calls" if calls and completion.stop_reason == "stop" else completion.stop_reason


def _chat_logprobs(tokens: list[str], logprobs: list[float], *, with_top: bool) -> dict[str, Any]:
    said = [
        {"token": token, "logprob": logprob, "bytes": list(token.encode())}
        for token, logprob in zip(tokens, logprobs, strict=True)
    ]
    return {"content": [{**one, "top_logprobs": [one] if with_top else []} for one in said]}


def _text_logprobs(tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None}


def _call_body(call: ToolCall, name: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {"id": name, "type": "function", "function": function}
