"""Agents as users write them: with OpenAI's client, in this process, in a thread, or in a process of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

from openai import AsyncOpenAI, OpenAI

LOOP = """
import json, os, sys
from openai import OpenAI
client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
messages = json.loads(sys.argv[1])
for _ in range(2):
    reply = client.chat.completions.create(model="any", messages=messages).choices[0].message.content
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "go on"}]
print(len(reply))
"""


async def two_turns(prompt: list[Any], base_url: str, api_key: str) -> dict[str, Any]:
    """Ask twice; the reward is the share of characters with an even code, as that of EvenEnv."""
    messages, replies = list(prompt), []
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        for _ in range(2):
            done = await client.chat.completions.create(model="any", messages=messages)
            replies.append(done.choices[0].message.content or "")
            messages += [{"role": "assistant", "content": replies[-1]}, {"role": "user", "content": "go on"}]
    text = "".join(replies)
    reward = sum(ord(character) % 2 == 0 for character in text) / max(len(text), 1)
    return {"reward": reward, "metrics": {"characters": len(text)}}


def in_a_thread(prompt: list[Any], base_url: str, api_key: str, model: str) -> float:
    with OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        done = client.chat.completions.create(model=model, messages=prompt)
    return float(len(done.choices[0].message.content or "") % 2)


async def in_a_process(prompt: list[Any], base_url: str, api_key: str) -> float:
    """Run a script that knows nothing of us but two environment variables."""
    import json

    environment = {**os.environ, "OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": api_key}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LOOP, json.dumps(prompt), env=environment, stdout=subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return float(int(printed) % 2)


async def broken(base_url: str) -> float:
    raise ConnectionError("the agent's own database is gone")


async def leaves(base_url: str) -> float:
    sys.exit(3)


def leaves_in_a_thread(base_url: str) -> float:
    sys.exit(3)


def stops_in_a_thread(base_url: str) -> float:
    return float(next(iter([])))


async def interrupts(base_url: str) -> float:
    raise KeyboardInterrupt


async def pays_what_breaks(base_url: str) -> Any:
    class Pay:
        def item(self) -> float:
            raise KeyError("no number here")

    return Pay()


async def pays_nothing(base_url: str) -> Any:
    return {"metrics": {}}


async def silent() -> float:
    return 1.0


async def asleep(base_url: str, api_key: str, prompt: list[Any]) -> float:
    await asyncio.sleep(60)
    return 1.0


def needs_more(base_url: str, browser: Any) -> float:
    return 0.0


def by_place(base_url: str, /) -> float:
    return 0.0


async def yields(base_url: str):
    yield 0.0
