"""An HTTP server in front of the engine, which speaks OpenAI's API. Calls under a session's address are recorded.

    /v1/...                    anyone's calls: sampled and forgotten
    /sessions/KEY/v1/...       one agent's calls in one episode: sampled as the run samples, and recorded

So an agent needs nothing but a base URL. Loopback needs no API key; any other host does.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import itertools
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import uvicorn
from loguru import logger
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from skyrl_train.engine.base import Completion, Engine, EngineDied, OnProgress, Request, SamplingParams
from skyrl_train.rollout.agents.openai_api import BadRequest, Body, ChatBody, TextBody, error_body, read_body
from skyrl_train.rollout.agents.replies import Reply, sse_event
from skyrl_train.rollout.agents.session import AgentSession, Call, SessionLimits
from skyrl_train.rollout.agents.streaming import Partial, in_pieces
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.types import Message

T = TypeVar("T")
KEY_VARIABLE = "SKYRL_API_KEY"
MAX_BODY = 64 * 2**20  # bytes
KEEP_ALIVE_S = 75  # longer than clients keep an idle connection (httpx: 5 s), which might ask while we hang up
GONE = Response(status_code=499)  # nginx's number for a client that has hung up; nobody is there to read it
EPISODE_OVER = error_body("this episode is over", "not_found_error")
EVENTS = "text/event-stream"


class Endpoint:
    """The server. It is bound when it is made and serves after `start`; `close` ends it with all that is under way."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        sampling: SamplingParams,
        *,
        model: str,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """port: 0 is any that is free. sampling: of calls outside sessions. OSError if the port is taken."""
        self.engine, self.template, self.sampling, self.model = engine, template, sampling, model
        self._sessions: dict[str, AgentSession] = {}
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}  # under way, by session
        self._numbers = itertools.count(1)
        is_local = _is_loopback(host)
        self.api_key = os.environ.get(KEY_VARIABLE) or ("unused" if is_local else secrets.token_urlsafe(24))
        self._needs_key = not is_local or KEY_VARIABLE in os.environ
        self._socket = _bound(host, port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"
        routes = [
            Route("/chat/completions", self._chat, methods=["POST"]),
            Route("/completions", self._text, methods=["POST"]),
            Route("/models", self._models),
        ]
        self._server = _Server(
            uvicorn.Config(
                Starlette(
                    routes=[
                        Mount("/v1", routes=routes),
                        Mount("/sessions/{session}/v1", routes=routes),
                        Route("/health", self._health),
                    ]
                ),
                log_config=None,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=1,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve from now on, in this event loop. More calls do nothing."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
            await self._server.is_up.wait()
            key = f" with the API key {self.api_key}" if self._needs_key and KEY_VARIABLE not in os.environ else ""
            logger.info(f"the policy answers as {self.model} at {self.url}/v1 (OpenAI's API){key}")

    def close(self) -> None:
        """End the server. Its task ends in the event loop, if that goes on."""
        self._server.should_exit = self._server.force_exit = True
        if self._serving is None:
            self._socket.close()

    # Sessions

    def open(self, session: AgentSession) -> str:
        """Record the calls of a session from now on, and return the base URL that its agent needs."""
        key = secrets.token_urlsafe(12)
        self._sessions[key], self._calls[key] = session, set()
        return f"{self.url}/sessions/{key}/v1"

    async def close_session(self, base_url: str) -> None:
        """Refuse the agent's calls from now on, end those under way, and free what the engine keeps for it."""
        key = base_url.rsplit("/", 2)[-2]
        session = self._sessions.pop(key)
        calls = self._calls.pop(key)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self.engine.forget(session.id)

    # Requests

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answered(request, ChatBody)

    async def _text(self, request: HttpRequest) -> Response:
        return await self._answered(request, TextBody)

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "skyrl"}]})

    async def _answered(self, request: HttpRequest, kind: type[Body]) -> Response:
        if not self._may_ask(request):
            words = "wrong or missing API key: send Authorization: Bearer KEY"
            return JSONResponse(error_body(words, "authentication_error"), 401)
        key = request.path_params.get("session")
        if key is not None and key not in self._sessions:
            return JSONResponse(EPISODE_OVER, 404)
        try:
            asked = self._asked(read_body(kind, await _read(request)), key)
            if asked.body.stream:
                return await self._streamed(request, asked)
            completion = await _unless_gone(request, self._sampled(asked))
        except BadRequest as bad:
            return JSONResponse(bad.body, 400)
        except ClientDisconnect:  # in the middle of its request
            return GONE
        except EngineDied as death:
            return JSONResponse(error_body(str(death), "server_error"), 503)
        except asyncio.CancelledError:
            if self._is_open(key):
                raise
            return JSONResponse(EPISODE_OVER, 404)
        return GONE if completion is None else JSONResponse(asked.reply.whole(completion))

    async def _streamed(self, request: HttpRequest, asked: Asked) -> Response:
        """Return a stream once its first piece is there: what fails before that has a status of its own."""
        pieces = in_pieces(partial(self._sampled, asked))
        first = await _unless_gone(request, _next(pieces))
        return GONE if first is None else StreamingResponse(self._events(asked, first, pieces), media_type=EVENTS)

    async def _events(
        self, asked: Asked, piece: Partial | Completion, pieces: AsyncGenerator[Partial | Completion]
    ) -> AsyncGenerator[str]:
        """Yield the events of a reply. An error on the way is the last one. Who hangs up cancels what is sampled."""
        try:
            async with aclosing(pieces):
                while isinstance(piece, Partial):
                    for event in asked.reply.news(piece):
                        yield event
                    piece = await anext(pieces)
            for event in asked.reply.end(piece):
                yield event
        except (RuntimeError, ValueError) as error:  # EngineDied and ReplyChanged among them
            yield sse_event(error_body(str(error), "server_error"))
        except asyncio.CancelledError:
            if self._is_open(asked.key):
                raise
            yield sse_event(EPISODE_OVER)

    def _asked(self, body: Body, key: str | None) -> Asked:
        """Return a request that may be sampled. BadRequest for what cannot."""
        number = next(self._numbers)
        session = self._passing_session(body, number) if key is None else self._sessions[key]
        messages, tools = (body.plain_messages, body.offered_tools) if isinstance(body, ChatBody) else ([], [])
        ids = session.prompt_of(messages, tools) if messages else self._ids_of(body)
        sampling = session.sampling_of(body, len(ids))
        reply = Reply(body, number, self.model, ids, self.template.tokenizer, may_call=bool(tools))
        return Asked(body, key, session, messages, tools, Request(ids, sampling, session.id), reply)

    async def _sampled(self, asked: Asked, on_progress: OnProgress | None = None) -> Completion:
        session = asked.session
        with self._under_way(asked.key):
            try:
                completion = await self.engine.generate(replace(asked.request, on_progress=on_progress))
            except EngineDied as death:
                session.death = death
                raise
            except ValueError as error:  # the engine does not take these tokens
                raise BadRequest(str(error)) from error
            finally:
                if asked.key is None:
                    await self.engine.forget(session.id)
        session.calls.append(Call(asked.messages, asked.request.prompt_ids, completion, asked.tools, asked.body.stops))
        return completion

    def _is_open(self, key: str | None) -> bool:
        return key is None or key in self._sessions

    def _passing_session(self, body: Body, number: int) -> AgentSession:
        """Return a session for one call that belongs to none: it may choose its own sampling and seed."""
        longest = self.engine.max_model_len
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens")
        chosen = {name: value for name in names if (value := getattr(body, name)) is not None}
        if chosen.get("top_k") == 0:  # vLLM's other word for off
            chosen["top_k"] = -1
        max_tokens = body.longest_reply or self.sampling.max_tokens
        chosen["min_tokens"] = min(chosen.get("min_tokens", self.sampling.min_tokens), max_tokens)
        try:
            sampling = replace(self.sampling, **chosen, max_tokens=max_tokens)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        seed = number if body.seed is None else body.seed
        return AgentSession(f"http_{number}", self.template, sampling, SessionLimits(None, longest, longest), seed)

    def _ids_of(self, body: Body) -> list[int]:
        assert isinstance(body, TextBody)
        prompt = body.one_prompt
        ids = self.template.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise BadRequest("the prompt is empty", param="prompt")
        return ids

    def _may_ask(self, request: HttpRequest) -> bool:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return not self._needs_key or hmac.compare_digest(given.encode(), self.api_key.encode())

    @contextmanager
    def _under_way(self, key: str | None) -> Generator[None]:
        """Let the end of the session cancel this task."""
        task = asyncio.current_task()
        if key is None or task is None:
            yield
            return
        calls = self._calls[key]
        calls.add(task)
        try:
            yield
        finally:
            calls.discard(task)


@dataclass(frozen=True)
class Asked:
    """A request that is sampled. key: of the session that records it; None: of none."""

    body: Body
    key: str | None
    session: AgentSession
    messages: list[Message]
    tools: list[dict[str, Any]]
    request: Request
    reply: Reply


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves the signals to the run, and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def _read(request: HttpRequest) -> bytes:
    """Return the body. BadRequest if it is longer than any conversation."""
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > MAX_BODY:
            raise BadRequest(f"the body is longer than {MAX_BODY} bytes")
    return bytes(read)


async def _next(pieces: AsyncGenerator[T]) -> T:
    return await anext(pieces)


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what the work returns; None, and the work is cancelled, if the client hangs up meanwhile."""
    working = asyncio.create_task(work)
    hanging_up = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, hanging_up):
            task.cancel()
        await asyncio.gather(working, hanging_up, return_exceptions=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(
            error.errno, f"cannot serve at {host}:{port} ({error.strerror}); set generator.http_endpoint_port"
        ) from error
    return made
