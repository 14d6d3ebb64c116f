"""An environment that returns or raises anything wrong fails alone: the round goes on and the message is kept."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

import skyrl_gym
from skyrl_gym.core import EnvFailure
from skyrl_gym.envs import register
from skyrl_train.batch.packing import pack
from skyrl_train.batch.samples import to_samples
from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.run.metrics import rollout_metrics
from skyrl_train.run.records.episode import EpisodeRecord, episode_record
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory
from tests.fakes import EvenEnv, ScriptedEngine
from tests.tiny_models import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=3, max_input_length=400, max_context=512, step_timeout_s=60, episode_timeout_s=300)
TOKENIZER = tiny_tokenizer()
ASKED: list[Prompt] = [
    Prompt(name, [{"role": "user", "content": "go"}], env_class, {})
    for name, env_class in (("0", "odd"), ("1", "even"))
]


class OddEnv(EvenEnv):
    """Even, but for the one method whose answer `answers` replaces."""

    answers: dict[str, Callable[[], Any]] = {}  # noqa: RUF012 - set by each test
    attributes: dict[str, Any] = {}  # noqa: RUF012 - set by each test
    num_made = 0

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config, extras)
        OddEnv.num_made += 1
        self.answer("constructor", None)
        for name, value in self.attributes.items():
            setattr(self, name, value)

    def answer(self, method: str, right: Any) -> Any:
        return self.answers[method]() if method in self.answers else right

    def init(self, prompt: Any) -> Any:
        return self.answer("init", super().init(prompt))

    def step(self, action: str) -> Any:
        return self.answer("step", super().step(action))

    def get_metrics(self) -> Any:
        return self.answer("get_metrics", {"turns": self.turns})

    def close(self) -> None:
        return self.answer("close", None)

    @staticmethod
    def aggregate_metrics(metrics: list[dict[str, Any]]) -> Any:
        return OddEnv.answers["aggregate_metrics"]() if "aggregate_metrics" in OddEnv.answers else {"turns": 2.0}


class OddAsyncEnv(OddEnv):
    """The same on the event loop."""

    async def init_async(self, prompt: Any) -> Any:
        await asyncio.sleep(0)
        return self.init(prompt)

    async def step_async(self, action: str) -> Any:
        await asyncio.sleep(0)
        return self.step(action)

    async def close_async(self) -> None:
        self.close()


class Evil:
    """Raises whatever is done with it."""

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(name)

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __float__ = __len__ = __iter__ = __eq__ = __hash__ = __str__  # ty: ignore


class EvilError(Exception):
    """Cannot be printed."""

    def __str__(self) -> str:
        raise SystemExit("printed")


class EvilDict(dict[str, Any]):
    """A dict that cannot be read."""

    def __contains__(self, key: object) -> bool:
        raise GeneratorExit

    keys = items = get = __contains__  # ty: ignore


def circular() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(5000):
        found = [found]
    return found


async def coroutine() -> None:
    pass


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


VALUES: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (
        None, True, 0, -1, 3.5, 1e300, -1e10, math.nan, math.inf, -math.inf, 10**400, 10**5000, 1 + 2j, "", "text",
        "1.0", "\ud800", "\x1b[31m", b"bytes", Decimal("NaN"), Decimal("sNaN"), Decimal(1), Fraction(1, 3), object(),
        Evil, len, np.float32("nan"), np.float64(0.5), np.bool_(True), np.complex64(1j), np.array([1.0, 2.0]),
        np.array([1.0]), torch.tensor(math.inf), torch.tensor([0.1, 0.2]), torch.tensor(True), torch.zeros(0),
        ValueError("returned"), range(3), {1, 2}, frozenset(), [0.1, 0.2], (), [None], ["text"], [[]], {},
        {"role": "user", "content": "x"}, [{"role": "user"}], [{"role": "user", "content": None}],
        [{"role": None, "content": "x"}], [{"role": [], "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": "\udfff"}], [{"role": "\ud800", "content": "x"}],
        [{"role": "nobody", "content": "x"}], [{"role": "user", "content": "x", 1: object()}],
        [{"role": "user", "content": "x", "tool_calls": 7}], [{"role": "user", "content": "x", "name": "\ud800"}],
        {"observations": [], "reward": None, "done": True}, {"observations": None, "reward": 1.0, "done": True},
        {"observations": [], "reward": 1.0}, {"reward": 1.0, "done": True}, {"a": object(), (1, 2): {(1, 2): 3}},
    )),
    Evil, EvilDict, lambda: EvilDict(observations=[], reward=1.0, done=True), circular, deep, coroutine,
    lambda: (letter for letter in "generator"),
    lambda: [Evil()], lambda: {"turns": Evil()},
    *(raising(error) for error in (
        SystemExit(), SystemExit("bye"), KeyboardInterrupt(), GeneratorExit(), StopIteration(1), StopAsyncIteration(),
        asyncio.CancelledError(), TimeoutError(), MemoryError(), RecursionError(), BaseException("base"), EvilError(),
        ExceptionGroup("many", [ValueError("\ud800")]), EnvFailure("\ud800 gone"), EnvFailure(Evil()),
        OSError(24, "files"), BaseExceptionGroup("worse", [SystemExit()]), KeyError(Evil),
        SyntaxError("x", ("f.py", 1, 1, "\ud800")),
    )),
]  # fmt: skip
KEYS = ("observations", "reward", "done", "truncated", "postprocessed_action", "metadata")


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, Callable[[], Any]]:
    """A method and what it answers: anything, or something right with one part replaced or left out."""
    method = draw(st.sampled_from(("constructor", "init", "step", "get_metrics", "close", "aggregate_metrics")))
    junk = draw(st.sampled_from(VALUES) | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ).map(lambda value: lambda: value))  # fmt: skip
    if method == "init" and draw(st.booleans()):
        return method, lambda: (junk(), {})
    if method == "step" and draw(st.integers(0, 3)) > 0:
        key, left_out = draw(st.sampled_from(KEYS)), draw(st.integers(0, 9)) == 0
        done = draw(st.booleans())

        def step() -> Any:
            right = {"observations": [{"role": "user", "content": "more"}], "reward": 0.5, "done": done, "metadata": {}}
            return {k: v for k, v in right.items() if k != key} if left_out else {**right, key: junk()}

        return method, step
    if method in ("get_metrics", "aggregate_metrics") and draw(st.booleans()):
        return method, lambda: {"turns": junk()}
    return method, junk


@pytest.fixture(params=[OddEnv, OddAsyncEnv], ids=["in a thread", "on the loop"], scope="module", autouse=True)
def _environments(request):
    register("odd", request.param)
    register("even", EvenEnv)
    yield
    skyrl_gym.envs.deregister("odd")
    skyrl_gym.envs.deregister("even")


def play(answers: dict[str, Callable[[], Any]], prompts: list[Prompt] = ASKED, **options: Any) -> list[Group]:
    OddEnv.answers, OddEnv.num_made = answers, 0
    collector = Collector(
        ScriptedEngine(TOKENIZER, lambda _: "reply"), ChatTemplate(TOKENIZER), LIMITS, env_configs={}, **options
    )
    try:
        return asyncio.run(collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=20))))
    finally:
        collector.close()


def played(method: str, answer: Callable[[], Any]) -> Trajectory:
    """The odd episode, after the even one was played beside it and both went as far as a batch and a record."""
    groups = play({method: answer})
    odd, even = (group.trajectories[0] for group in groups)
    assert (even.end, len(even.turns), even.num_attempts) == (EpisodeEnd.FINISHED, 2, 1)
    for name, value in rollout_metrics(groups).items():
        assert isinstance(value, int | float), name
    assert pack(to_samples([odd, even])).rewards.isfinite().all()
    line = episode_record(odd, "train", 1, lambda ids: [str(i) for i in ids]).to_json()
    assert json.dumps(line).isascii()
    EpisodeRecord.from_json(line).failure  # noqa: B018 - it can be read again
    assert math.isfinite(odd.reward)
    if odd.end is EpisodeEnd.ENV_FAILURE:
        assert odd.failure
        assert odd.failure.encode()
        assert odd.failure.isprintable()
    return odd


@pytest.mark.filterwarnings("ignore:coroutine 'coroutine' was never awaited")
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(malformed())
def test_of_500_malformed_answers_none_ends_the_round(answer):
    played(*answer)


@pytest.mark.parametrize("place", range(10))
@pytest.mark.parametrize("method", ["init", "step", "get_metrics", "close", "init_timeout_s"])
@pytest.mark.filterwarnings("ignore:coroutine 'coroutine' was never awaited")
def test_what_an_environment_has_in_the_place_of_a_method_ends_its_own_episode_alone(method, place, monkeypatch):
    value = (None, 3, "text", Evil(), Evil, len, lambda: None, coroutine, math.nan, -1.0)[place]
    if method in ("init", "step", "close") and skyrl_gym.registry["odd"].entry_point is OddAsyncEnv:
        method = f"{method}_async"
    monkeypatch.setattr(OddEnv, "attributes", {method: value})
    odd = played("nothing", lambda: None)
    is_right = method.startswith("close") or (method == "init_timeout_s" and place in (0, 1))
    assert (odd.end is EpisodeEnd.ENV_FAILURE) is not is_right
    if not is_right:
        assert odd.failure is not None
        assert method.removesuffix("_async") in odd.failure


@pytest.mark.filterwarnings("ignore:coroutine 'coroutine' was never awaited")
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", ["constructor", "init", "step", "close"])
def test_every_value_in_the_place_of_a_whole_answer(method, value):
    odd = played(method, value)
    assert odd.end is EpisodeEnd.ENV_FAILURE or method in ("constructor", "close")


@pytest.mark.parametrize(
    ("given", "reward"),
    [
        (1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(2), 2.0), (np.bool_(False), 0.0),
        (torch.tensor(0.25), 0.25), (torch.tensor([0.25], requires_grad=True), 0.25), (Fraction(1, 4), 0.25),
        (1e9, 1e9), (-1e9, -1e9),
    ],
)  # fmt: skip
def test_one_number_in_any_dress_is_a_reward(given, reward):
    odd = played("step", lambda: {"observations": [], "reward": given, "done": True, "metadata": {}})
    assert (odd.end, odd.reward) == (EpisodeEnd.FINISHED, reward)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (math.nan, "reward must be a finite float, not nan"), (-math.inf, "a finite float, not -inf"),
        (np.float32("inf"), "a finite float, not inf"), (torch.tensor(math.nan), "a finite float, not nan"),
        (10**400, "a finite float, not inf"), (1.1e9, "within ±1e+09 to be learned from, not 1.1e+09"),
        (None, 'one finite float, not "None"'), ("1.0", 'one finite float, not "1.0" (str)'),
        (1 + 0j, "(complex)"), (np.complex64(1), "(complex64)"), ([0.1, 0.2], "(list)"), (np.zeros(2), "(ndarray)"),
        (torch.zeros(2), "(Tensor)"), (b"1", "(bytes)"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_learned_from_is_the_environments_failure(given, words):
    odd = played("step", lambda: {"observations": [], "reward": given, "done": True, "metadata": {}})
    assert odd.end is EpisodeEnd.ENV_FAILURE
    assert str(odd.failure).startswith("odd: wrong answer of step: reward must ")
    assert words in str(odd.failure)
    assert odd.num_attempts == (2 if words.startswith(("(", "one")) else 3)  # a wrong type does not come by chance


def test_a_nan_that_comes_by_chance_is_retried_and_costs_nothing():
    rewards = iter([math.nan, 0.5])
    odd = played("step", lambda: {"observations": [], "reward": next(rewards), "done": True, "metadata": {}})
    assert (odd.end, odd.reward, odd.num_attempts) == (EpisodeEnd.FINISHED, 0.5, 2)


def test_what_cut_short_adds_is_checked_too(monkeypatch):
    monkeypatch.setattr(OddEnv, "cut_short", lambda self: math.nan)
    answer = {"observations": [{"role": "user", "content": "x" * 450}], "reward": 1.0, "done": False, "metadata": {}}
    odd = played("step", lambda: answer)
    assert odd.end is EpisodeEnd.ENV_FAILURE
    assert "cut_short: reward must be a finite float" in str(odd.failure)


def test_messages_are_copied_so_an_environment_may_go_on_writing_in_its_own():
    said: list[dict[str, str]] = []

    def step() -> Any:
        said.append({"role": "user", "content": str(len(said))})
        return {"observations": said, "reward": 0.0, "done": len(said) == 2, "metadata": {}}

    odd = played("step", step)
    assert [len(turn.observation) for turn in odd.turns] == [1, 2]


@pytest.mark.parametrize(
    "error",
    [NameError("x"), AttributeError("x"), TypeError("x"), KeyError("x"), IndexError("x"), ZeroDivisionError("x"),
     ImportError("x"), NotImplementedError("x"), RecursionError("x"), AssertionError("x"), SystemExit(1)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_mistake_in_the_code_is_not_retried_and_its_place_is_told(error):
    odd = played("step", raising(error))
    assert OddEnv.num_made == odd.num_attempts == 1
    assert f"odd: step raised {type(error).__name__}" in str(odd.failure)
    assert "test_malformed_answers.py:" in str(odd.failure)
    assert "in call: raise error" in str(odd.failure)


@pytest.mark.parametrize(("error", "attempts"), [(RuntimeError("x"), 2), (ConnectionError("x"), 3), (EvilError(), 3)])
def test_an_error_that_repeats_itself_is_retried_once_and_a_servers_as_often_as_asked(error, attempts):
    assert played("step", raising(error)).num_attempts == attempts
    assert played("constructor", raising(ValueError("no such column"))).num_attempts == 1


def test_an_odd_env_class_fails_before_it_is_made():
    unknown = [Prompt("7", ASKED[0].messages, "nobody_knows_me", {}), ASKED[1]]
    first = play({}, unknown)[0].trajectories[0]
    assert (first.end, first.num_attempts) == (EpisodeEnd.ENV_FAILURE, 1)
    assert "no environment 'nobody_knows_me' is registered" in str(first.failure)


def test_the_same_failure_is_said_once_with_how_many_more_there_were(caplog_lines):
    prompts = [Prompt(str(i), ASKED[0].messages, "odd", {}) for i in range(48)]
    words = "all 48 episodes of a round failed in their environments, in 48 attempts"
    with pytest.raises(EveryEpisodeFailed, match=words) as end:
        play({"step": raising(NameError("name 'oops' is not defined"))}, prompts)
    first, more = caplog_lines
    assert "failed (it is not played again): odd: step raised NameError: name 'oops' is not defined" in first
    assert more.startswith("and 47 more like it: odd: step raised NameError")
    assert len(str(end.value).splitlines()) == 2


def test_failures_that_differ_in_their_numbers_are_one_kind_and_many_kinds_are_only_counted(caplog_lines):
    letters = iter("abcdefgh" * 9)
    ports = iter(range(9999))

    def fails() -> Any:
        raise ConnectionError(f"port {next(ports)} of server {next(letters)}")

    prompts = [Prompt(str(i), ASKED[0].messages, "odd", {}) for i in range(8)]
    with pytest.raises(EveryEpisodeFailed):
        play({"step": fails}, prompts, max_env_workers=1)
    assert len(caplog_lines) == 11  # 5 first ones, their counts, and one line for the rest
    assert caplog_lines[-1] == "and 9 failures of 3 other kinds"


@pytest.fixture
def caplog_lines():
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message).strip()), format="{message}", level="WARNING")
    yield lines
    logger.remove(sink)


def test_a_template_that_refuses_what_the_environment_says_is_the_environments_failure():
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    template += "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    OddEnv.answers = {
        "step": lambda: {"observations": [{"role": "tool", "content": "x"}], "reward": 0.0, "done": False}
    }
    engine = ScriptedEngine(TOKENIZER, lambda _: "reply")
    collector = Collector(engine, ChatTemplate(TOKENIZER, template=template), LIMITS, env_configs={})
    groups = asyncio.run(collector.collect(Round("train", 1, ASKED, 1, SamplingParams(max_tokens=20))))
    collector.close()
    odd, even = (group.trajectories[0] for group in groups)
    assert even.end is EpisodeEnd.FINISHED
    assert "the chat template does not print messages of user, assistant, tool: no tools here" in str(odd.failure)


@pytest.mark.parametrize("value", [raising(SystemExit()), raising(RuntimeError("x")), coroutine, lambda: None])
def test_episodes_in_lockstep_do_not_wait_for_a_broken_one(value):
    odd, even = (group.trajectories[0] for group in play({"step": value}, deterministic=True))
    assert odd.end is EpisodeEnd.ENV_FAILURE
    assert even.end is EpisodeEnd.FINISHED
