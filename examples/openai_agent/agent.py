"""An agent with a client of its own: a service that knows OpenAI's API and echo_env, and nothing of training."""

from __future__ import annotations

import os
import re
from typing import Any

from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from integrations.openenv.clients import EchoAction, EchoEnv

CLIENT = AsyncOpenAI(base_url="http://unused", api_key="unused", max_retries=0)  # its connections serve all episodes
ACTION = re.compile(r"<action>([^<]+)</action>")


async def solve(messages: list[Any], client: AsyncOpenAI) -> str:
    """Return what the environment said: the model has two tries to write an action."""
    async with await EchoEnv.from_url(os.environ["ECHO_URL"]) as env:
        await env.reset()
        for _ in range(2):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            reply = answer.choices[0].message.content or ""
            if action := ACTION.search(reply):
                return (await env.step(EchoAction(action[1]))).observation.echoed or ""
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": "Write <action>the words</action>."},
            ]
    return ""


async def play(request: Request) -> JSONResponse:
    task = await request.json()
    client = CLIENT.with_options(base_url=task["base_url"], api_key=task["api_key"])
    return JSONResponse({"said": await solve(task["messages"], client)})


app = Starlette(routes=[Route("/play", play, methods=["POST"])])
