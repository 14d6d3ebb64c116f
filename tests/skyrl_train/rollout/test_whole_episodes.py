"""Tokens and logprobs from the engine to the sample, where something is left out or edited on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_gym.tool_calls import read_tool_calls
from skyrl_train.batch.samples import to_samples
from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector, Round
from skyrl_train.rollout.task import EpisodeLimits
from skyrl_train.types import Prompt, Sample, Trajectory
from tests.fakes import EvenEnv, ScriptedEngine
from tests.tiny_models import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=None, max_input_length=400, max_context=512, step_timeout_s=60, episode_timeout_s=300)
END = "<|im_end|>"
SECOND = "sec<|im_start|>ond"  # reads "second" without its special token: encoded again it would be other tokens


class ThreeTurnsEnv(EvenEnv):
    """Three turns, paid 1, 2 and 4. `edits` says as what each reply shall stand in the history."""

    edits: tuple[str | None, ...] = (None, None, None)

    def step(self, action: str) -> Any:
        self.turns += 1
        return {
            "observations": [{"role": "user", "content": f"[{self.turns}]"}],
            "reward": float(2 ** (self.turns - 1)),
            "done": self.turns == 3,
            "metadata": {},
            "postprocessed_action": self.edits[self.turns - 1],
        }


class DoorsEnv(EvenEnv):
    """Offers a tool. Its answer names the doors that the reply's calls opened."""

    offered: Any = ({"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}},)

    @property
    def tool_schemas(self) -> Any:
        return self.offered

    def step(self, action: str) -> Any:
        self.turns += 1
        opened = [call.arguments["n"] for call in read_tool_calls(action)]
        answer = [{"role": "tool", "content": f"open: {opened}"}]
        return {"observations": answer, "reward": float(sum(opened)), "done": self.turns == 2, "metadata": {}}


class NoToolsEnv(DoorsEnv):
    offered = ({"name": "go"},)


class EditingEnv(ThreeTurnsEnv):
    """Shortens the first reply, leaves the second as it is, and edits the last one, which nobody reads again."""

    edits = ("short", "second", "never read")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _environments() -> Iterator[None]:
    register("three_turns", ThreeTurnsEnv)
    register("editing", EditingEnv)
    register("doors", DoorsEnv)
    register("no_tools", NoToolsEnv)
    yield
    skyrl_gym.envs.deregister("no_tools")
    skyrl_gym.envs.deregister("doors")
    skyrl_gym.envs.deregister("three_turns")
    skyrl_gym.envs.deregister("editing")


def play(tokenizer, env_class: str, *, one_message: bool, replies: list[str]) -> tuple[Trajectory, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer, lambda request: replies[len(engine.requests) - 1])
    template = ChatTemplate(tokenizer, one_message=one_message)
    collector = Collector(engine, template, LIMITS, env_configs={})
    prompts = [Prompt("0", [{"role": "user", "content": "go"}], env_class)]
    groups = asyncio.run(collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=40))))
    collector.close()
    return groups[0].trajectories[0], engine


def trained(sample: Sample) -> list[tuple[int, float]]:
    rows = zip(sample.input_ids, sample.loss_mask, sample.rollout_logprobs, strict=True)
    return [(token, logprob) for token, is_trained, logprob in rows if is_trained]


def sampled(completion, *, without_end: bool = False) -> list[tuple[int, float]]:
    pairs = list(zip(completion.response_ids, completion.logprobs, strict=True))
    return pairs[:-1] if without_end else pairs


def test_within_one_message_every_token_keeps_its_logprob_and_only_the_last_end_is_trained(tokenizer):
    trajectory, engine = play(tokenizer, "three_turns", one_message=True, replies=["a", "second", "third one"])
    [sample] = to_samples([trajectory])
    behind_prompt = tokenizer.decode(sample.input_ids[sample.num_prompt_tokens :])
    assert behind_prompt == f"a[1]second[2]third one{END}"
    first, second, last = engine.completions
    expected = [*sampled(first, without_end=True), *sampled(second, without_end=True), *sampled(last)]
    assert trained(sample) == expected
    assert len({logprob for _, logprob in expected}) == len(expected)  # so no two can have been swapped
    for request in engine.requests:
        assert request.prompt_ids == sample.input_ids[: len(request.prompt_ids)]
    assert [reward for reward in sample.rewards if reward] == [1.0, 2.0, 4.0]
    assert sample.rewards[-1] == 4.0


def test_within_messages_every_end_is_trained(tokenizer):
    trajectory, engine = play(tokenizer, "three_turns", one_message=False, replies=["a", "second", "third one"])
    [sample] = to_samples([trajectory])
    assert trained(sample) == [pair for completion in engine.completions for pair in sampled(completion)]
    assert tokenizer.decode([token for token, _ in trained(sample)]) == f"a{END}second{END}third one{END}"


def test_an_environments_tools_are_printed_and_the_calls_are_trained_as_they_were_sampled(tokenizer):
    calls = [f'{{"name":"go","parameters":{{"n":{door}}}}}' for door in (2, 3)]
    trajectory, engine = play(tokenizer, "doors", one_message=False, replies=calls)
    assert trajectory.reward == 5.0
    [sample] = to_samples([trajectory])
    assert trained(sample) == [pair for completion in engine.completions for pair in sampled(completion)]
    read = tokenizer.decode(engine.requests[1].prompt_ids)
    assert '"name": "go"' in read
    assert "open: [2]" in read.partition(calls[0])[2]


def test_tools_of_a_wrong_form_are_a_fault_of_the_environment(tokenizer):
    with pytest.raises(Exception, match="tool_schemas must be") as failed:
        play(tokenizer, "no_tools", one_message=False, replies=["a"])
    assert "no_tools" in str(failed.value)


@pytest.mark.parametrize("one_message", [False, True])
def test_an_edited_reply_is_what_the_policy_reads_and_the_sampled_one_is_what_is_trained(tokenizer, one_message):
    trajectory, engine = play(tokenizer, "editing", one_message=one_message, replies=["too long", SECOND, "third"])
    assert [turn.text for turn in trajectory.turns] == ["too long", "second", "third"]
    first, second, last = engine.completions
    edited, unedited = to_samples([trajectory])
    assert trained(edited) == sampled(first, without_end=one_message)
    assert trained(unedited) == [*sampled(second, without_end=one_message), *sampled(last)]
    start = tokenizer.decode(engine.requests[0].prompt_ids)
    between = (
        (lambda text: text)
        if one_message
        else (lambda text: f"{END}\n<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n")
    )
    read = [tokenizer.decode(request.prompt_ids) for request in engine.requests]
    assert read[1] == f"{start}short{between('[1]')}"
    assert read[2] == f"{start}short{between('[1]')}{SECOND}{between('[2]')}"
    assert tokenizer.decode(unedited.input_ids) == f"{read[2]}third{END}"
    assert unedited.num_prompt_tokens == len(engine.requests[1].prompt_ids)
    assert (sum(edited.rewards), sum(unedited.rewards)) == (1.0, 6.0)


def test_a_reply_cut_by_its_length_keeps_its_last_token_within_one_message(tokenizer):
    long_reply = "x" * 50  # of which 40 are sampled: there is no end to leave out
    trajectory, engine = play(tokenizer, "three_turns", one_message=True, replies=[long_reply, "b", "c"])
    [sample] = to_samples([trajectory])
    assert len(engine.completions[0].response_ids) == 40
    assert trained(sample)[:40] == sampled(engine.completions[0])
