"""Groups as they finish, rounds that are under way together, and an engine that dies under them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch
from loguru import logger

import skyrl_gym
from skyrl_gym.core import EnvFailure
from skyrl_gym.envs import register
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_train.engine.base import EngineDied, Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.generators.base import GeneratorInterface
from skyrl_train.generators.custom_generator import GeneratorCollector
from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
from skyrl_train.rollout import playing
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import EpisodeEnd, Prompt
from tests.fakes import CountdownEnv, EvenEnv, FlakyEnv, ScriptedEngine
from tests.tiny_models import tiny_policy, tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=5, max_input_length=400, max_context=512, step_timeout_s=60, episode_timeout_s=300)
SAMPLING = SamplingParams(max_tokens=20)
MESSAGES = [{"role": "user", "content": "count"}]


class JudgedEnv(BaseTextEnv):
    """Asks an engine what each action is worth, and takes every error of its judge for bad luck of its own."""

    engine: Any = None

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()

    async def init_async(self, prompt: Any) -> Any:
        return prompt, {}

    async def step_async(self, action: str) -> Any:
        try:
            await self.engine.generate(Request([1], SAMPLING, "judge"))
        except RuntimeError as error:
            raise EnvFailure("the judge did not answer") from error
        return {"observations": [], "reward": 1.0, "done": True, "metadata": {}}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _environments():
    kinds = {"countdown": CountdownEnv, "flaky": FlakyEnv, "judged": JudgedEnv, "even": EvenEnv}
    for name, kind in kinds.items():
        register(name, kind)
    FlakyEnv.attempts.clear()
    CountdownEnv.live = 0
    yield
    for name in kinds:
        skyrl_gym.envs.deregister(name)
    assert CountdownEnv.live == 0, "an environment was not closed"


@pytest.fixture
def warnings():
    heard: list[str] = []
    sink = logger.add(lambda message: heard.append(str(message)), level="WARNING", format="{message}")
    yield heard
    logger.remove(sink)


class Gate(ScriptedEngine):
    """Says the right next number, but answers a session only once the test lets sessions of that name pass."""

    def __init__(self, tokenizer: Any, *open_to: str) -> None:
        super().__init__(tokenizer, self._next_number)
        self.open_to, self.moved = set(open_to), asyncio.Event()

    def _next_number(self, request: Request) -> str:
        said = [
            int(line.split()[0])
            for line in str(self.tokenizer.decode(request.prompt_ids)).splitlines()
            if " left" in line
        ]
        return str((said[-1] if said else 2) - 1)

    def open(self, name: str) -> None:
        self.open_to.add(name)
        self.moved.set()
        self.moved = asyncio.Event()

    async def generate(self, request: Request) -> Any:
        while not request.session_id.startswith(tuple(self.open_to)):
            await self.moved.wait()
        return await super().generate(request)


class Mortal(ScriptedEngine):
    """Dies at its first request, or when the test says so; then it is dead for everyone."""

    dead: str | None = None

    async def generate(self, request: Request) -> Any:
        await asyncio.sleep(0)
        if self.dead is not None:
            raise EngineDied(self.dead)
        return await super().generate(request)


def counting(*starts: int, **extras: Any) -> list[Prompt]:
    return [Prompt(str(i), MESSAGES, "countdown", {"start": start, **extras}) for i, start in enumerate(starts)]


def flaky(name: str, breaks: int) -> Prompt:
    return Prompt(name, MESSAGES, "flaky", {"start": 2, "breaks": breaks, "how": "failure", "name": name})


def collector_of(engine: Any, **options: Any) -> Collector:
    return Collector(engine, ChatTemplate(engine.tokenizer), LIMITS, env_configs={}, **options)


def training(step: int, prompts: list[Prompt], n: int = 2) -> Round:
    return Round("train", step, prompts, n, SAMPLING)


async def test_a_group_comes_as_soon_as_it_is_whole(tokenizer):
    engine = Gate(tokenizer, "train_1_1_", "train_1_0_0")
    collector = collector_of(engine)
    async with aclosing(collector.groups(training(1, counting(2, 2, 2)))) as groups:
        first = await anext(groups)
        assert first.prompt.uid == "1"  # of prompt 0 one episode is missing, of prompt 2 both
        engine.open("train_1_2_")
        assert (await anext(groups)).prompt.uid == "2"
        engine.open("train_1_0_")
        last = await anext(groups)
        assert [(t.prompt.uid, t.repetition, t.reward) for t in last.trajectories] == [("0", 0, 2.0), ("0", 1, 2.0)]
        with pytest.raises(StopAsyncIteration):
            await anext(groups)
    collector.close()


async def test_who_stops_early_leaves_no_episode_and_no_environment_behind(tokenizer):
    engine = Gate(tokenizer, "train_1_0_")
    collector, seen = collector_of(engine), []
    async with aclosing(collector.groups(training(1, counting(2, 2, 2)), seen.append)) as groups:
        await anext(groups)
        assert CountdownEnv.live == 4
    assert CountdownEnv.live == 0
    assert len(seen) == 2
    assert len(engine.forgotten) == 6
    collector.close()


async def test_two_rounds_under_way_do_not_mix(tokenizer, warnings):
    engine = Gate(tokenizer, "train_1_", "train_2_")
    collector = collector_of(engine, max_retries=3)
    even = [Prompt(str(i), MESSAGES, "even", {"max_turns": 1}) for i in range(2)]  # it would take two turns
    prompts = [*even, flaky("a", 0)]
    broken = [*counting(2, 2), flaky("b", 2)]
    first, second = await asyncio.gather(
        collector.collect(training(1, prompts)), collector.collect(training(2, broken))
    )
    collector.close()
    assert [[g.prompt.uid for g in groups] for groups in (first, second)] == [["0", "1", "a"], ["0", "1", "b"]]
    sessions = {request.session_id for request in engine.requests}
    expected = {f"train_1_{uid}_{i}_0" for uid in ("0", "1", "a") for i in range(2)}
    expected |= {f"train_2_{uid}_{i}_0" for uid in ("0", "1") for i in range(2)}
    assert expected <= sessions
    assert {session.rsplit("_", 1)[0] for session in sessions - expected} == {"train_2_b_0", "train_2_b_1"}
    assert set(engine.forgotten) >= sessions
    seeds = [[t.seed for group in groups for t in group.trajectories] for groups in (first, second)]
    assert not set(seeds[0]) & set(seeds[1])
    assert sum(t.num_attempts - 1 for group in first for t in group.trajectories) == 0
    assert sum(t.num_attempts - 1 for group in second for t in group.trajectories) == 2
    cuts = [line for line in warnings if "of this round were cut at the turn limit" in line]
    assert [line.split(" episodes")[0] for line in cuts] == ["4 of 6"]  # of the first round alone


@pytest.mark.parametrize("breaks", [0, 1])
async def test_a_round_that_should_be_reproducible_says_when_failures_changed_who_played_together(
    tokenizer, warnings, breaks
):
    collector = collector_of(Gate(tokenizer, "train_1_"), max_retries=3)
    await collector.collect(replace(training(1, [*counting(2), flaky("a", breaks)]), reproducible=True))
    collector.close()
    told = [line for line in warnings if "rounding may give other rewards the next time" in line]
    assert len(told) == breaks


async def test_the_failures_of_one_round_are_not_counted_in_the_other(tokenizer):
    engine = Gate(tokenizer)
    collector = collector_of(engine, max_retries=0)
    healthy = asyncio.create_task(collector.collect(training(1, counting(2), n=1)))
    await asyncio.sleep(0.05)
    with pytest.raises(RuntimeError, match=r"all 1 episodes .* in 1 attempts\. 1 of the episodes ended"):
        await collector.collect(training(2, [flaky("b", 99)], n=1))
    engine.open("train_1_")
    [[trajectory]] = [group.trajectories for group in await healthy]
    assert trajectory.end is EpisodeEnd.FINISHED
    collector.close()


async def test_a_stall_report_names_its_round_and_only_its_own_episodes(tokenizer, warnings, monkeypatch):
    monkeypatch.setattr(playing, "STALL_REPORT_S", 0.05)
    engine = Gate(tokenizer, "train_1_")
    collector = collector_of(engine)
    stuck = asyncio.create_task(collector.collect(training(2, counting(2), n=1)))
    await collector.collect(training(1, counting(2), n=1))
    warnings.clear()  # on a busy machine that round stood still as well
    while not warnings:  # noqa: ASYNC110 (the log tells nobody)
        await asyncio.sleep(0.01)
    engine.open("train_2_")
    await stuck
    collector.close()
    assert all(line.startswith("train_2: no episode ended for") for line in warnings)
    assert "1 wait for the engine (0_0…)" in warnings[0]


async def test_a_dead_engine_is_no_environment_failure_and_nothing_is_retried(tokenizer, warnings):
    engine = Mortal(tokenizer, lambda request: "1")
    engine.dead = "the engine died of ZeroDivisionError"
    with pytest.raises(EngineDied, match="ZeroDivisionError"):
        await collector_of(engine).collect(training(1, [*counting(2, 2), flaky("a", 1)]))
    assert [line for line in warnings if "played again" in line and "the engine died" in line] == []


async def test_an_environment_that_blames_itself_for_a_dead_engine_is_not_believed(tokenizer, warnings):
    engine = Mortal(tokenizer, lambda request: "1")
    judge = Mortal(tokenizer, lambda request: "1")
    JudgedEnv.engine, judge.dead = judge, "the engine died of hunger"
    prompts = [Prompt("0", MESSAGES, "judged", {})]
    with pytest.raises(EngineDied, match="of hunger"):
        await collector_of(engine).collect(training(1, prompts))
    assert not any("did not answer" in line for line in warnings)


async def test_the_death_of_a_real_engine_ends_every_round_that_is_under_way(tokenizer):
    policy = tiny_policy()
    engine = TorchEngine(policy, tokenizer, max_num_seqs=8, max_num_batched_tokens=64)
    long = SamplingParams(max_tokens=300, min_tokens=300)
    collector = Collector(engine, ChatTemplate(tokenizer), LIMITS, env_configs={})
    rounds = [replace(training(step, counting(2, 2)), sampling=long) for step in (1, 2)]
    under_way = [asyncio.create_task(collector.collect(this_round)) for this_round in rounds]
    while engine.stats().steps < 5:  # noqa: ASYNC110 (the engine's thread tells nobody about its steps)
        await asyncio.sleep(0.01)
    await engine.pause()
    with torch.no_grad():
        policy.module.get_output_embeddings().weight.fill_(float("nan"))
    await engine.weights_changed(1)
    await engine.resume()
    async with asyncio.timeout(200):
        outcomes = await asyncio.gather(*under_way, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineDied, EngineDied]
    assert all("the policy's logits are not finite" in str(outcome) for outcome in outcomes)
    collector.close()
    await engine.close()


class Careless(GeneratorInterface):
    """Takes an error of the engine for an episode without a reward, or hides it in a group."""

    def __init__(self, client: InferenceEngineClient, how: str) -> None:
        self.client, self.how = client, how

    async def generate(self, input_batch: Any) -> Any:
        num = len(input_batch["prompts"])
        try:
            if self.how == "task group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.client.generate({"prompt_token_ids": [[1, 2]] * num}))
            await self.client.generate({"prompt_token_ids": [[1, 2]] * num})
        except RuntimeError:
            if self.how == "hides it":
                raise ValueError("no episode today") from None
        return {
            "prompt_token_ids": [[1, 2]] * num,
            "response_ids": [[3]] * num,
            "rewards": [0.0] * num,
            "loss_masks": [[1]] * num,
            "stop_reasons": ["env_failure"] * num,
            "rollout_logprobs": [[-0.1]] * num,
        }


@pytest.mark.parametrize("how", ["swallows it", "hides it", "task group"])
async def test_whatever_a_generator_makes_of_a_dead_engine_the_round_ends_with_it(tokenizer, how):
    engine = Mortal(tokenizer, lambda request: "1")
    client = InferenceEngineClient(engine, ChatTemplate(tokenizer), max_model_len=128, seed=1)
    engine.dead = "the engine died of a generator"
    with pytest.raises(EngineDied, match="of a generator"):
        await GeneratorCollector(Careless(client, how), client).collect(training(1, counting(2)))


class Slow(GeneratorInterface):
    """Samples twice for each prompt, the second time when the test says so, in a task of its own."""

    def __init__(self, client: InferenceEngineClient) -> None:
        self.client, self.goes_on = client, asyncio.Event()

    async def generate(self, input_batch: Any) -> Any:
        ids = [i.to_string() for i in input_batch["trajectory_ids"]]
        prompts = [[1, 2]] * len(ids)
        await self.client.generate({"prompt_token_ids": prompts, "session_ids": ids})
        await self.goes_on.wait()
        sampling = asyncio.create_task(self.client.generate({"prompt_token_ids": prompts, "session_ids": ids}))
        out = await sampling
        return {
            "prompt_token_ids": prompts,
            "response_ids": out["response_ids"],
            "rewards": [1.0] * len(ids),
            "loss_masks": [[1] * len(r) for r in out["response_ids"]],
            "stop_reasons": out["stop_reasons"],
            "rollout_logprobs": out["response_logprobs"],
        }


async def test_two_rounds_of_a_generator_keep_their_sessions_seeds_and_limits_apart(tokenizer):
    def requests_of(engine: ScriptedEngine, name: str) -> list[tuple[str, int, int]]:
        own = [r for r in engine.requests if r.session_id.startswith(name)]
        return sorted((r.session_id, r.sampling.seed, r.sampling.max_tokens) for r in own)

    async def played(*steps: int) -> ScriptedEngine:
        engine = ScriptedEngine(tokenizer, lambda request: "1")
        client = InferenceEngineClient(engine, ChatTemplate(tokenizer), max_model_len=128, seed=1)
        generator = Slow(client)
        player = GeneratorCollector(generator, client)
        rounds = [Round("train", step, counting(2), 2, SamplingParams(max_tokens=step)) for step in steps]
        tasks = [asyncio.create_task(player.collect(this_round)) for this_round in rounds]
        await asyncio.sleep(0.01)
        generator.goes_on.set()
        await asyncio.gather(*tasks)
        return engine

    alone, together = [await played(3), await played(5)], await played(3, 5)
    assert requests_of(together, "train_3_custom_") == requests_of(alone[0], "train_3_custom_")
    assert requests_of(together, "train_5_custom_") == requests_of(alone[1], "train_5_custom_")
    assert {tokens for _, _, tokens in requests_of(together, "train_5_")} == {5}
    assert len(together.requests) == 8
    assert sorted(set(together.forgotten)) == sorted({r.session_id for r in together.requests})


async def test_the_groups_of_a_generator_are_those_that_it_collects(tokenizer):
    client = InferenceEngineClient(
        ScriptedEngine(tokenizer, lambda request: "1"), ChatTemplate(tokenizer), max_model_len=128, seed=1
    )
    generator, seen = Slow(client), []
    generator.goes_on.set()
    player = GeneratorCollector(generator, client)
    one_by_one = [group async for group in player.groups(training(1, counting(2, 2)), seen.append)]
    assert [group.prompt.uid for group in one_by_one] == ["0", "1"]
    assert [t.id for t in seen] == ["0_0", "0_1", "1_0", "1_1"]
    again = await player.collect(training(1, counting(2, 2)))
    assert [g.trajectories for g in one_by_one] == [g.trajectories for g in again]
