"""A reply in pieces: shown as it is sampled, never half a letter nor a stop string, and given up with its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from skyrl_train.engine.base import Completion, EngineDied, Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.rollout.agents.endpoint import Endpoint
from skyrl_train.rollout.agents.session import AgentSession, SessionLimits
from skyrl_train.rollout.agents.streaming import Partial, ReplyChanged, ShownText, cut_at_stop, in_pieces
from skyrl_train.rollout.chat import ChatTemplate
from tests.fakes import ScriptedEngine, varied_logprobs
from tests.tiny_models import tiny_policy, tiny_tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]
TOKENIZER = tiny_tokenizer()


class Slow(ScriptedEngine):
    """Samples a token only when it is let: `tokens.put_nowait(number)`. It may be told to die instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens: asyncio.Queue[int | EngineDied] = asyncio.Queue()
        self.cancelled = asyncio.Event()

    async def generate(self, request: Request) -> Completion:
        ids = self.tokenizer.encode(self.reply(request), add_special_tokens=False)
        number = 0
        try:
            while number < len(ids):
                more = await self.tokens.get()
                if isinstance(more, EngineDied):
                    raise more
                number += more
                if request.on_progress is not None and number < len(ids):
                    request.on_progress(ids[:number], varied_logprobs(ids[:number]))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await super().generate(request)


async def rounds_of_the_loop() -> None:
    """Let the server take what was sampled, however busy the machine is: it is in this event loop."""
    for _ in range(50):
        await asyncio.sleep(0)


class Served:
    """An endpoint with a slow engine, and a client of OpenAI's."""

    def __init__(self, reply: str) -> None:
        self.engine = Slow(TOKENIZER, lambda request: reply)
        self.template = ChatTemplate(TOKENIZER)
        self.endpoint = Endpoint(self.engine, self.template, SamplingParams(max_tokens=60), model="tiny")
        self.clients: list[openai.AsyncOpenAI] = []

    def client(self, base_url: str | None = None) -> openai.AsyncOpenAI:
        url = base_url or f"{self.endpoint.url}/v1"
        self.clients.append(openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0))
        return self.clients[-1]

    async def stream(self, base_url: str | None = None, **more: Any) -> AsyncIterator[Any]:
        await self.endpoint.start()
        made: Any = self.client(base_url).chat.completions
        return await made.create(model="m", messages=HELLO, stream=True, **more)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    made = Served("ab☃c END d")
    yield made
    for client in made.clients:
        await client.close()
    made.endpoint.close()
    if made.endpoint._serving is not None:
        await asyncio.wait_for(made.endpoint._serving, 60)


async def test_each_piece_is_there_before_the_next_token_is_sampled_and_no_letter_is_cut(served: Served) -> None:
    served.engine.tokens.put_nowait(1)
    more: dict[str, Any] = {
        "logprobs": True,
        "extra_body": {"return_token_ids": True},
        "stream_options": {"include_usage": True},
    }
    stream = await served.stream(**more)
    chunks = [await asyncio.wait_for(anext(stream), 30)]
    for _ in range(4):  # b, and the three bytes of a snowman
        served.engine.tokens.put_nowait(1)
        await rounds_of_the_loop()
    chunks += [await asyncio.wait_for(anext(stream), 30) for _ in range(2)]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["a", "b", "☃"]
    assert served.engine.completions == []
    served.engine.tokens.put_nowait(100)
    chunks += [chunk async for chunk in stream]
    [done] = served.engine.completions
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "ab☃c END d"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None] * 4 + ["stop"]
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices] == ["assistant"] + [None] * 4
    assert len({chunk.id for chunk in chunks}) == 1
    dumped = [chunk.model_dump() for chunk in chunks if chunk.choices]
    assert [token for chunk in dumped for token in chunk["choices"][0]["token_ids"]] == done.response_ids
    assert ["prompt_token_ids" in chunk for chunk in dumped] == [True] + [False] * 4
    assert [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in dumped] == [1, 1, 3, 8, 0]
    assert chunks[-1].usage.completion_tokens == 13


async def test_a_stop_string_is_not_shown_nor_what_may_become_one(served: Served) -> None:
    served.engine.reply = lambda request: "a E ENEND"
    served.engine.tokens.put_nowait(2)
    stream = await served.stream(stop="END")
    shown = [(await asyncio.wait_for(anext(stream), 30)).choices[0].delta.content]
    for number in (1, 1, 2, 1):
        served.engine.tokens.put_nowait(number)
        await rounds_of_the_loop()
    served.engine.tokens.put_nowait(100)
    shown += [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(shown) == "a E EN"
    assert shown[:2] == ["a ", "E "]
    served.engine.tokens.put_nowait(100)
    whole: Any = await served.client().completions.create(model="m", prompt="x", stop=["☃", "END"])
    assert whole.choices[0].text == "a E EN"


async def test_a_conversation_goes_on_from_a_reply_that_was_cut_at_the_agents_stop_string(served: Served) -> None:
    session = AgentSession("s", served.template, SamplingParams(max_tokens=60), SessionLimits(None, 300, 512), seed=3)
    await served.endpoint.start()
    url = served.endpoint.open(session)
    served.engine.tokens.put_nowait(100)
    said = "".join([c.choices[0].delta.content or "" async for c in await served.stream(url, stop=" END")])
    assert said == "ab☃c"
    again = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    first = served.engine.completions[0]
    assert session.prompt_of(again, [])[: len(first.response_ids) + len(served.engine.requests[0].prompt_ids)] == (
        served.engine.requests[0].prompt_ids + first.response_ids
    )


async def test_who_goes_away_in_mid_stream_ends_the_sampling(served: Served) -> None:
    served.engine.tokens.put_nowait(1)
    stream: Any = await served.stream()
    await anext(stream)
    assert not served.engine.cancelled.is_set()
    await stream.close()
    await asyncio.wait_for(served.engine.cancelled.wait(), 30)


async def test_an_episode_that_ends_ends_its_streams(served: Served) -> None:
    session = AgentSession("s", served.template, SamplingParams(max_tokens=60), SessionLimits(None, 300, 512), seed=3)
    await served.endpoint.start()
    url = served.endpoint.open(session)
    served.engine.tokens.put_nowait(1)
    stream = await served.stream(url)
    await anext(stream)
    await served.endpoint.close_session(url)
    with pytest.raises(openai.APIError, match="this episode is over"):
        await anext(stream)
    assert session.calls == []


async def test_an_error_before_the_first_token_has_a_status_and_a_later_one_is_an_event(served: Served) -> None:
    served.engine.tokens.put_nowait(EngineDied("it burnt"))
    with pytest.raises(openai.InternalServerError, match="it burnt"):
        await served.stream()
    served.engine.tokens.put_nowait(1)
    stream = await served.stream()
    await anext(stream)
    served.engine.tokens.put_nowait(EngineDied("it burnt"))
    with pytest.raises(openai.APIError, match="it burnt"):
        [chunk async for chunk in stream]
    body = {"messages": HELLO, "stream": True}
    for number in (1, EngineDied("it burnt")):
        served.engine.tokens.put_nowait(number)
    async with httpx.AsyncClient(timeout=120) as client:
        raw = await client.post(f"{served.endpoint.url}/v1/chat/completions", json=body)
    events = raw.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in raw.text


async def test_the_torch_engine_shows_each_token_when_it_is_sampled_and_the_last_with_the_reply() -> None:
    engine = TorchEngine(tiny_policy(), TOKENIZER, max_num_seqs=4, max_num_batched_tokens=64)
    request = Request([1, 2, 3], SamplingParams(max_tokens=12, min_tokens=12, seed=5), "a")
    whole = await engine.generate(request)
    seen: list[Partial] = []
    asked = Request(request.prompt_ids, request.sampling, "b", on_progress=lambda *now: seen.append(Partial(*now)))
    beside = Request([4], SamplingParams(max_tokens=3), "c")
    done, _ = await asyncio.gather(engine.generate(asked), engine.generate(beside))
    assert [len(partial.response_ids) for partial in seen] == list(range(1, 12))
    assert all(partial.response_ids == done.response_ids[: len(partial.response_ids)] for partial in seen)
    assert seen[-1].logprobs == done.logprobs[:11]
    assert done.response_ids == whole.response_ids
    pieces = [piece async for piece in in_pieces(lambda told: engine.generate(asked))]
    assert isinstance(pieces[-1], Completion)
    await engine.close()


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("abc", (), ["a", "b", "c"]),
        ("aab", ("aab",), ["", "", ""]),
        ("aaab", ("aab",), ["", "", "a", ""]),
        ("a\nb", ("\n\n", ""), ["a", "", "\nb"]),
        ("é", (), ["", "é"]),
    ],
)
def test_what_is_held_back_comes_as_soon_as_it_is_known(text: str, stops: tuple[str, ...], shown: list[str]) -> None:
    ids = TOKENIZER.encode(text)
    growing = ShownText(TOKENIZER, stops)
    assert [growing.news(ids[: n + 1]) for n in range(len(ids))] == shown
    assert "".join(shown) + growing.rest(text) == cut_at_stop(text, stops)


def test_a_reply_that_another_engine_computed_otherwise_is_an_error_and_half_a_letter_at_the_end_is_shown() -> None:
    growing = ShownText(TOKENIZER)
    growing.news(TOKENIZER.encode("ab"))
    assert growing.news(TOKENIZER.encode("a")) == ""  # computed again from the start
    with pytest.raises(ReplyChanged):
        growing.rest("acc")
    assert growing.rest("ab\ufffd") == "\ufffd"
