"""Agents with a client of their own: what the endpoint answers, what is recorded, and that it is trained on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError

from skyrl_train.batch.samples import to_samples
from skyrl_train.engine.base import Completion, EngineDied, Request, SamplingParams
from skyrl_train.entrypoints.main_base import main
from skyrl_train.rollout.agents.endpoint import Endpoint
from skyrl_train.rollout.agents.episode import Agent
from skyrl_train.rollout.agents.served import ServedRounds
from skyrl_train.rollout.agents.session import AgentSession, SessionLimits
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.run.metrics import read_metrics
from skyrl_train.types import EpisodeEnd, Group, Prompt
from tests.fakes import ScriptedEngine
from tests.tiny_models import tiny_tokenizer

HERE = "tests.skyrl_train.rollout.agents.my_agents"
ADD: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SAMPLING = SamplingParams(max_tokens=20, stop=("END",))
LIMITS = EpisodeLimits(max_turns=None, max_input_length=300, max_context=512, step_timeout_s=60, episode_timeout_s=300)


class Served:
    """An endpoint that is up, its engine, and a client of OpenAI's."""

    def __init__(self, **how: Any) -> None:
        self.tokenizer = tiny_tokenizer()
        self.engine = ScriptedEngine(self.tokenizer, lambda request: "yes, I do")
        self.template = ChatTemplate(self.tokenizer)
        self.endpoint = Endpoint(self.engine, self.template, SAMPLING, model="tiny", **how)
        self.clients: list[AsyncOpenAI] = []

    def client(self, base_url: str | None = None, key: str = "unused") -> AsyncOpenAI:
        self.clients.append(AsyncOpenAI(base_url=base_url or f"{self.endpoint.url}/v1", api_key=key, max_retries=0))
        return self.clients[-1]

    async def close(self) -> None:
        """Close the clients too: one that the collector finds later closes itself in another test's event loop."""
        for client in self.clients:
            await client.close()
        self.endpoint.close()
        assert self.endpoint._serving is not None
        await asyncio.wait_for(self.endpoint._serving, 60)

    def session(self, max_calls: int | None = None) -> AgentSession:
        return AgentSession("s_1", self.template, SAMPLING, SessionLimits(max_calls, 300, 512), seed=3)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    made = Served()
    await made.endpoint.start()
    yield made
    await made.close()


async def test_chat_completions_as_openais_client_reads_them(served: Served) -> None:
    done = await served.client().chat.completions.create(
        model="whatever", messages=HELLO, logprobs=True, extra_body={"return_token_ids": True}
    )
    [completion], [request] = served.engine.completions, served.engine.requests
    assert done.choices[0].message.content == "yes, I do"
    assert done.choices[0].finish_reason == "stop"
    assert done.model == "tiny"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(request.prompt_ids), 10)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert [token.logprob for token in logprobs.content or []] == completion.logprobs
    raw = done.model_dump()
    assert raw["prompt_token_ids"] == request.prompt_ids == served.template.encode(HELLO, add_generation_prompt=True)
    assert raw["choices"][0]["token_ids"] == completion.response_ids
    assert served.engine.forgotten == ["http_1"]


async def test_logprobs_name_tokens_by_their_ids_where_a_client_asks_as_of_vllm(served: Served) -> None:
    """SkyRL's integration of verifiers sends both."""
    done = await served.client().chat.completions.create(
        model="m",
        messages=HELLO,
        logprobs=True,
        top_logprobs=1,
        extra_body={"return_tokens_as_token_ids": True},
    )
    [completion] = served.engine.completions
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    said = logprobs.content or []
    assert [token.token for token in said] == [f"token_id:{token}" for token in completion.response_ids]
    assert [[(top.token, top.logprob) for top in token.top_logprobs] for token in said] == [
        [(token.token, token.logprob)] for token in said
    ]


async def test_a_stream_says_the_same(served: Served) -> None:
    stream = await served.client().chat.completions.create(
        model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "yes, I do"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10


async def test_plain_completions_take_text_or_token_ids(served: Served) -> None:
    client = served.client()
    by_text = await client.completions.create(model="m", prompt="abc", logprobs=1)
    by_ids = await client.completions.create(model="m", prompt=served.tokenizer.encode("abc"))
    assert by_text.choices[0].text == by_ids.choices[0].text == "yes, I do"
    assert served.engine.requests[0].prompt_ids == served.engine.requests[1].prompt_ids
    assert by_text.choices[0].logprobs is not None
    assert by_text.choices[0].logprobs.token_logprobs == served.engine.completions[0].logprobs
    assert [model.id async for model in client.models.list()] == ["tiny"]


async def test_a_call_outside_sessions_samples_as_it_asks_for(served: Served) -> None:
    client = served.client()
    asked: Any = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3}
    await client.chat.completions.create(
        model="m", messages=HELLO, temperature=0.5, top_p=0.9, max_tokens=7, extra_body=asked
    )
    sampled = served.engine.requests[-1].sampling
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens) == (0.5, 0.9, 7)
    assert {name: getattr(sampled, name) for name in asked} == asked
    await client.completions.create(model="m", prompt="abc", max_tokens=2, extra_body={"min_tokens": 3, "top_k": 0})
    sampled = served.engine.requests[-1].sampling
    assert (sampled.min_tokens, sampled.top_k) == (2, -1)
    with pytest.raises(BadRequestError, match="top_k=-3 must be"):
        await client.completions.create(model="m", prompt="abc", extra_body={"top_k": -3})


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
            "half of a surrogate pair",
        ),
        ("completions", b'{"prompt": "\\udfff"}', "half of a surrogate pair"),
        ("completions", b'{"prompt": "a", "temperature": Infinity}', "temperature=inf must be 0"),
        ("completions", b'{"prompt": "a", "temperature": 1e-320}', "temperature=1e-320 must be 0"),
        ("completions", b'{"prompt": "a", "temperature": NaN}', "temperature: "),
    ],
)
async def test_what_no_tokenizer_and_no_engine_takes_is_a_bad_request(
    served: Served, path: str, body: bytes, words: str
) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        answer = await client.post(f"{served.endpoint.url}/v1/{path}", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


async def test_a_client_that_hangs_up_within_its_request_is_no_error(served: Served, caplog: Any) -> None:
    host, port = served.endpoint.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"prompt"')
    await writer.drain()
    await asyncio.sleep(0.1)  # the server has begun to read
    writer.close()
    await writer.wait_closed()
    async with httpx.AsyncClient(timeout=120) as client:
        assert (await client.get(f"{served.endpoint.url}/health")).status_code == 200
    await asyncio.sleep(0.1)
    ours = ("uvicorn", "skyrl_train")  # others log what the garbage collector finds of other tests
    errors = [record for record in caplog.records if record.levelname == "ERROR" and record.name.startswith(ours)]
    assert errors == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n": 2}, "n=2 is not supported; leave it out or send 1$"),
        ({"top_logprobs": 5, "logprobs": True}, "top_logprobs=5 is not supported; leave it out or send 0 or send 1$"),
        ({"tools": [{"type": "function"}]}, "each of tools must be"),
        (
            {"tools": ADD, "tool_choice": "required"},
            'tool_choice="required" is not supported; leave it out or send "auto" or send "none"$',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "as text",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "as text"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "list of text",
        ),
        ({"messages": [{"role": "king", "content": "x"}]}, "must be one of system"),
        ({"temperature": -1}, "temperature: Input should be greater"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "at most 511 can be read"),
    ],
)
async def test_what_cannot_be_answered_is_refused_with_the_field(
    served: Served, more: dict[str, Any], words: str
) -> None:
    body: Any = {"model": "m", "messages": HELLO, **more}
    with pytest.raises(BadRequestError, match=words):
        await served.client().chat.completions.create(**body)
    assert served.engine.requests == []


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"[" * 100_000, b'{"messages": 3}', b'{"messages": [3]}', b"\xff"])
async def test_hostile_bodies_are_refused_and_the_server_stays_up(served: Served, raw: bytes) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        answer = await client.post(f"{served.endpoint.url}/v1/chat/completions", content=raw)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert (await client.get(f"{served.endpoint.url}/health")).status_code == 200


async def test_a_session_samples_as_the_run_does_and_keeps_the_tokens(served: Served) -> None:
    session = served.session()
    base_url = served.endpoint.open(session)
    client = served.client(base_url)
    first = await client.chat.completions.create(
        model="m", messages=HELLO, temperature=0.1, max_tokens=15, stop="!", seed=9
    )
    said = first.choices[0].message.content
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": f" {said}\n"},
        {"role": "user", "content": "and now?"},
    ]
    await client.chat.completions.create(model="m", messages=messages, max_tokens=500)
    one, two = served.engine.requests
    assert one.sampling.temperature == 1.0  # the run's: the learner computes those logprobs
    assert (one.sampling.max_tokens, two.sampling.max_tokens) == (15, 20)
    assert one.sampling.stop == ("END", "!")
    assert one.sampling.seed != two.sampling.seed
    assert {one.session_id, two.session_id} == {"s_1"}
    assert two.prompt_ids[: len(one.prompt_ids) + 10] == one.prompt_ids + served.engine.completions[0].response_ids
    turns = session.turns(1.5)
    assert [turn.reward for turn in turns] == [0.0, 1.5]
    assert turns[0].observation == [{"role": "user", "content": "and now?"}]
    await served.endpoint.close_session(base_url)
    assert served.engine.forgotten == ["s_1"]
    with pytest.raises(NotFoundError, match="this episode is over"):
        await client.chat.completions.create(model="m", messages=HELLO)


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_are_offered_called_and_answered_and_the_calls_stay_token_for_token(
    served: Served, stream: bool
) -> None:
    """The loop of every agent: ask, do what was called, say what came of it, ask again."""
    replies = ['I add. <tool_call>{"name": "add",  "arguments": {"a": 1}}</tool_call>', "It is 2."]
    served.engine.reply = lambda request: replies[len(served.engine.requests) - 1]
    sampling = replace(SAMPLING, max_tokens=80)
    session = AgentSession("s_1", served.template, sampling, SessionLimits(None, 2000, 2500), seed=3)
    client = served.client(served.endpoint.open(session))
    first = await asked(client, HELLO, stream)
    assert (first["content"], first["finish_reason"]) == ("I add.", "tool_calls")
    [call] = first["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1})
    answered: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": first["content"], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "two"},
    ]
    last = await asked(client, answered, stream)
    assert (last["content"], last["finish_reason"], last["tool_calls"]) == ("It is 2.", "stop", None)
    one, two = (request.prompt_ids for request in served.engine.requests)
    assert '"name": "add"' in served.tokenizer.decode(one)
    sampled = one + served.engine.completions[0].response_ids
    assert two[: len(sampled)] == sampled
    assert "two" in served.tokenizer.decode(two[len(sampled) :])
    edited = [*HELLO, {**answered[1], "content": "I see."}, answered[2]]
    served.engine.reply = lambda request: "fine"
    await asked(client, edited, stream)
    read = served.tokenizer.decode(served.engine.requests[2].prompt_ids)
    assert 'I see.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in read


async def asked(client: AsyncOpenAI, messages: list[Any], stream: bool) -> dict[str, Any]:
    done: Any = await client.chat.completions.create(model="m", messages=messages, tools=ADD, stream=stream)
    if not stream:
        return {**done.choices[0].message.model_dump(), "finish_reason": done.choices[0].finish_reason}
    said, end = [chunk.choices[0] async for chunk in done]
    return {**said.delta.model_dump(), "finish_reason": end.finish_reason}


async def test_a_conversation_with_other_tools_is_read_anew_and_fewer_tokens_than_the_least_are_given(
    served: Served,
) -> None:
    sampling = replace(SAMPLING, min_tokens=8)
    session = AgentSession("s_1", served.template, sampling, SessionLimits(None, 2000, 2500), seed=3)
    client = served.client(served.endpoint.open(session))
    first = await client.chat.completions.create(model="m", messages=HELLO, max_tokens=4)
    assert [served.engine.requests[0].sampling.min_tokens, served.engine.requests[0].sampling.max_tokens] == [4, 4]
    said = first.choices[0].message.content
    messages: list[Any] = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": "add"}]
    await client.chat.completions.create(model="m", messages=messages, tools=ADD)
    offered = served.template.offering(ADD).encode(messages, add_generation_prompt=True)
    assert served.engine.requests[1].prompt_ids == offered  # the first call's tokens do not name the tool
    assert '"name": "add"' in served.tokenizer.decode(offered)


async def test_an_edited_history_and_a_second_conversation_are_read_as_they_are_sent(served: Served) -> None:
    session = served.session()
    client = served.client(served.endpoint.open(session))
    await client.chat.completions.create(model="m", messages=HELLO)
    edited: list[Any] = [*HELLO, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why?"}]
    await client.chat.completions.create(model="m", messages=edited)
    other: list[Any] = [{"role": "system", "content": "be brief"}, *HELLO]
    await client.chat.completions.create(model="m", messages=other)
    [_, second, third] = [request.prompt_ids for request in served.engine.requests]
    assert second == served.template.encode(edited, add_generation_prompt=True)
    assert third == served.template.encode(other, add_generation_prompt=True)


async def test_a_call_too_many_and_a_history_too_long_end_the_episode_by_their_limit(served: Served) -> None:
    session = served.session(max_calls=1)
    client = served.client(served.endpoint.open(session))
    await client.chat.completions.create(model="m", messages=HELLO)
    with pytest.raises(BadRequestError, match="may make 1 calls"):
        await client.chat.completions.create(model="m", messages=HELLO)
    assert session.cut == "turns"
    long = served.session()
    client = served.client(served.endpoint.open(long))
    with pytest.raises(BadRequestError, match="at most 300 can be read") as refused:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 400}])
    assert refused.value.code == "context_length_exceeded"
    assert long.cut == "input"


class Stuck(ScriptedEngine):
    """Never answers; counts the requests that were cancelled."""

    num_cancelled = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked, self.cancelled = asyncio.Event(), asyncio.Event()

    async def generate(self, request: Request) -> Completion:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self.cancelled.set()
            raise
        raise AssertionError


async def test_a_client_that_hangs_up_and_an_episode_that_ends_leave_nothing(served: Served) -> None:
    stuck = served.endpoint.engine = Stuck(served.tokenizer, lambda request: "")
    leaving = asyncio.create_task(served.client().chat.completions.create(model="m", messages=HELLO))
    await asyncio.wait_for(stuck.asked.wait(), 60)
    leaving.cancel()
    await asyncio.wait_for(stuck.cancelled.wait(), 60)
    stuck.asked.clear()
    base_url = served.endpoint.open(served.session())
    asking = asyncio.create_task(served.client(base_url).chat.completions.create(model="m", messages=HELLO))
    await asyncio.wait_for(stuck.asked.wait(), 60)
    await served.endpoint.close_session(base_url)
    with pytest.raises(NotFoundError, match="this episode is over"):
        await asking
    assert stuck.num_cancelled == 2
    assert served.endpoint._sessions == served.endpoint._calls == {}


async def test_an_idle_connection_is_closed_by_the_client_first(served: Served) -> None:
    """Both would close it after 5 s, and a request of that moment would get no answer."""
    idle_s = httpx.Limits().keepalive_expiry
    assert idle_s is not None
    assert served.endpoint._server.config.timeout_keep_alive > 2 * idle_s


async def test_64_clients_at_once(served: Served) -> None:
    sessions = [
        AgentSession(f"s_{i}", served.template, SAMPLING, SessionLimits(None, 300, 512), seed=i) for i in range(64)
    ]
    urls = [served.endpoint.open(session) for session in sessions]
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64), timeout=120) as client:
        for _ in range(2):
            body = {"messages": HELLO}
            answers = await asyncio.gather(*(client.post(f"{url}/chat/completions", json=body) for url in urls))
            assert {answer.status_code for answer in answers} == {200}
    assert all(len(session.calls) == 2 for session in sessions)


async def test_another_host_needs_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYRL_API_KEY", "secret")
    made = Served()
    await made.endpoint.start()
    with pytest.raises(APIStatusError, match="wrong or missing API key"):
        await made.client(key="guess").chat.completions.create(model="m", messages=HELLO)
    await made.client(key="secret").chat.completions.create(model="m", messages=HELLO)
    await made.close()
    monkeypatch.delenv("SKYRL_API_KEY")
    open_to_all = Served(host="0.0.0.0")
    assert len(open_to_all.endpoint.api_key) > 20
    assert open_to_all.endpoint._needs_key
    open_to_all.endpoint.close()


async def test_a_port_that_is_taken_is_named(served: Served) -> None:
    port = int(served.endpoint.url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"cannot serve at 127.0.0.1:{port} .*http_endpoint_port"):
        Served(port=port)


# Rounds


def rounds(made: Served, agent: str, **how: Any) -> ServedRounds:
    limits = EpisodeLimits(**{**{name: getattr(LIMITS, name) for name in LIMITS.__slots__}, **how})
    collector = Collector(
        made.engine, made.template, limits, env_configs={}, agent=(Agent.named(f"{HERE}:{agent}"), made.endpoint)
    )
    return ServedRounds(collector, made.endpoint)


async def played(made: Served, agent: str, **how: Any) -> list[Group]:
    prompts = [Prompt(str(i), HELLO, "agent", {"level": i}) for i in range(2)]
    player = rounds(made, agent, **how)
    try:
        return await player.collect(Round("train", 1, prompts, 2, SAMPLING))
    finally:
        player.close()


@pytest.mark.parametrize(("agent", "num_turns"), [("two_turns", 2), ("in_a_thread", 1), ("in_a_process", 2)])
async def test_agents_of_three_kinds_are_trained_on_the_tokens_that_were_sampled(agent: str, num_turns: int) -> None:
    made = Served()
    groups = await played(made, agent)
    assert [group.prompt.uid for group in groups] == ["0", "1"]
    for trajectory in [trajectory for group in groups for trajectory in group.trajectories]:
        assert trajectory.end is EpisodeEnd.FINISHED
        assert len(trajectory.turns) == num_turns
        [sample] = to_samples([trajectory])  # checks that the trained tokens are those that were sampled
        assert sum(sample.loss_mask) == 10 * num_turns
        assert sum(sample.rewards) == trajectory.reward
    assert len({request.session_id for request in made.engine.requests}) == 4
    assert sorted(made.engine.forgotten) == sorted({request.session_id for request in made.engine.requests})


async def test_an_agent_that_fails_is_an_environment_that_fails() -> None:
    with pytest.raises(EveryEpisodeFailed, match="ConnectionError: the agent's own database is gone"):
        await played(Served(), "broken")
    with pytest.raises(EveryEpisodeFailed, match="without a single call of http"):
        await played(Served(), "silent")
    with pytest.raises(EveryEpisodeFailed, match=r"it took longer than 0\.2 s"):
        await played(Served(), "asleep", episode_timeout_s=0.2)


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        ("leaves", "SystemExit: 3"),
        ("leaves_in_a_thread", "SystemExit: 3"),
        ("stops_in_a_thread", "StopIteration"),
        ("interrupts", "KeyboardInterrupt"),
        ("pays_what_breaks", "KeyError"),
        ("pays_nothing", "reward must be one finite float"),
    ],
)
async def test_whatever_an_agent_raises_or_pays_ends_no_run(agent: str, words: str) -> None:
    with pytest.raises(EveryEpisodeFailed, match=words):
        await asyncio.wait_for(played(Served(), agent, episode_timeout_s=200), 100)


async def test_a_dead_engine_ends_the_run_whatever_the_agent_makes_of_it() -> None:
    class Dead(ScriptedEngine):
        async def generate(self, request: Request) -> Completion:
            raise EngineDied("out of memory")

    made = Served()
    made.engine = made.endpoint.engine = Dead(made.tokenizer, lambda request: "")
    with pytest.raises(EngineDied, match="out of memory"):
        await played(made, "two_turns")


async def test_an_agent_that_breaks_at_a_limit_has_used_up_its_turns_and_is_paid_nothing() -> None:
    groups = await played(Served(), "two_turns", max_turns=1)
    for trajectory in [trajectory for group in groups for trajectory in group.trajectories]:
        assert trajectory.end is EpisodeEnd.OUT_OF_TURNS
        assert (len(trajectory.turns), trajectory.reward, trajectory.num_attempts) == (1, 0.0, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:run", "generator.agent=no_such_module:run cannot be imported: .*there is no module"),
        (f"{HERE}:nothing", "has no nothing"),
        ("my_agent.py", "must be a name like 'package.module:Class'"),
        ("tests.skyrl_train.rollout.agents.test_agents:LIMITS", "is of type .*, and no function"),
        (f"{HERE}:by_place", "takes base_url by position; drop the / from it"),
        (f"{HERE}:yields", "is a generator function; it must return its answer"),
        ("tests.fakes:ScriptedEngine", "is a class; name a function, or an object of it that can be called"),
        ("builtins:max", "generator.agent=builtins:max has no parameters that can be read"),
        (f"{HERE}:needs_more", "needs browser; offered are prompt, extras, base_url"),
    ],
)
def test_an_agent_that_cannot_be_called_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Agent.named(name)


@pytest.mark.parametrize("agent", ["two_turns", "in_a_process"])
def test_a_run_with_an_agent_learns_from_it(given: Path, tmp_path: Path, agent: str) -> None:
    status = main(
        [
            f"data.train_data=['{given}/data.jsonl']",
            "data.val_data=[]",
            f"trainer.policy.model.path={given}/model",
            f"trainer.ckpt_path={tmp_path}",
            f"trainer.export_path={tmp_path}/exports",
            "trainer.device=cpu",
            "trainer.bf16=false",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=2",
            "trainer.algorithm.use_kl_loss=false",
            "generator.n_samples_per_prompt=2",
            f"generator.agent={HERE}:{agent}",
            "generator.sampling_params.max_generate_length=6",
        ]
    )
    assert status == 0
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["step"] > 0]
    assert len(lines) == 2
    for line in lines:
        assert line["generate/num_turns"] == 2.0
        assert line["policy/rollout_train_logprobs_abs_diff_turn_2"] < 1e-4
    assert any(line["policy/grad_norm"] > 0 for line in lines if "policy/grad_norm" in line)
    if agent == "two_turns":
        assert lines[0]["environment/characters"] > 0
    assert json.loads((tmp_path / "summary.json").read_text())
