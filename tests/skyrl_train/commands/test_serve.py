"""`skyrl serve` with the real client of OpenAI's API."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from skyrl_train.commands import serve
from skyrl_train.commands.main import main
from skyrl_train.commands.serve import served_name
from skyrl_train.commands.sources import source
from skyrl_train.commands.trained import Talker
from skyrl_train.engine.base import Request, SamplingParams
from tests.ports import taken_port

CPU = ["trainer.device=cpu", "trainer.bf16=false"]
HELLO: Any = [{"role": "user", "content": "hello"}]


def free_port() -> int:
    with taken_port() as taken:
        return taken.getsockname()[1]


@asynccontextmanager
async def served(talker: Talker, *words: str) -> AsyncGenerator[str]:
    """Run the command's server in this event loop, and give its base URL."""
    port = free_port()
    options = serve.parser().parse_intermixed_args([talker.source.named, "--port", str(port), *words])
    serving = asyncio.create_task(serve.serve(talker, options))
    try:
        for _ in range(2400):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                assert not serving.done(), serving.exception()
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_openais_client_gets_the_reply_of_the_trained_model(runs):
    run = runs["lora"]
    talker = Talker(source(str(run)), CPU)
    engine = await talker.start()
    ids = talker.chat_template.start(HELLO).ids
    expected = await engine.generate(Request(ids, SamplingParams(max_tokens=9, temperature=0.0), "a"))
    await engine.close()
    async with served(talker) as url, openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        assert [model.id for model in (await client.models.list()).data] == [run.name]
        asked: Any = {"model": run.name, "messages": HELLO, "max_tokens": 9, "temperature": 0}
        done = await client.chat.completions.create(**asked)
        assert done.choices[0].message.content == expected.text
        pieces = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        assert "".join(c.choices[0].delta.content or "" for c in pieces if c.choices) == expected.text


async def test_another_host_needs_the_key(runs, monkeypatch):
    monkeypatch.setenv("SKYRL_API_KEY", "open sesame")
    talker = Talker(source(str(runs["full"])), CPU)
    async with served(talker, "--host", "0.0.0.0") as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="guessed", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="any", messages=HELLO, max_tokens=1)
        async with openai.AsyncOpenAI(base_url=url, api_key="open sesame", max_retries=0) as client:
            done = await client.chat.completions.create(model="any", messages=HELLO, max_tokens=1)
            assert done.usage is not None
            assert done.usage.completion_tokens == 1


def test_a_port_that_is_taken_is_refused(runs, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(runs["full"]), *CPU, "--port", str(taken.getsockname()[1])]
        assert main(["serve", *words]) == 2
    assert "give another --host or --port" in capsys.readouterr().err
    assert main(["serve", str(runs["full"]), "--port", "70000", *CPU]) == 2


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", 99999, "--port=99999 must be from 0 to 65535"),
        ("127.0.0.1", None, "in use); give another --host or --port"),
        ("no.such.host.invalid", 0, "cannot serve at no.such.host.invalid:0 ("),
    ],
)
def test_an_address_that_cannot_be_served_at_is_refused_before_anything_is_loaded(
    host, port, says, monkeypatch, capsys
):
    monkeypatch.setattr("skyrl_train.commands.trained.Talker", None)
    with taken_port() as taken:
        given = taken.getsockname()[1] if port is None else port
        assert main(["serve", "a_run", "--host", host, "--port", str(given)]) == 2
    assert says in capsys.readouterr().err


def test_a_model_is_served_under_the_name_of_its_folder_however_that_is_written(tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [served_name(word) for word in (".", "..", "~/run/", "../model", "owner/name")] == [
        "model", "run", "run", "model", "name",
    ]  # fmt: skip
