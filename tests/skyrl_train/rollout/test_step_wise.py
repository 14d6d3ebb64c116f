"""Histories printed anew before every turn: what is read is what the template prints, and all is trained once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.batch.samples import to_samples
from skyrl_train.config import ConfigError, load_config
from skyrl_train.conversations import sample_of
from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.prompts import DataError
from skyrl_train.rollout.agents.session import AgentSession, Call, SessionLimits
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector, Round
from skyrl_train.rollout.step_wise import StepWiseChat
from skyrl_train.rollout.template_check import TemplateRefused
from skyrl_train.types import Prompt, Trajectory
from tests.fakes import ScriptedEngine
from tests.real_templates import byte_tokenizer, message, render, source_of, space_tokenizer
from tests.skyrl_train.rollout.test_real_templates import FAMILIES, REFUSED, family_end, ids_of
from tests.skyrl_train.rollout.test_whole_episodes import LIMITS, SECOND, EditingEnv, ThreeTurnsEnv, sampled, trained
from tests.tiny_models import tiny_tokenizer

# Leaves the reasoning out of all replies but the last, as the templates of Qwen3, DeepSeek-R1 and others do.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = FORGETS.replace("split('</think>')[-1]", "strip()")
REPLIES = ["<think>hm</think>a", "b", "<think>why</think>c"]


@pytest.fixture(autouse=True)
def _environments() -> Iterator[None]:
    register("three_turns", ThreeTurnsEnv)
    register("editing", EditingEnv)
    yield
    skyrl_gym.envs.deregister("three_turns")
    skyrl_gym.envs.deregister("editing")


def play(
    template: str | None, replies: list[str], env_class: str = "three_turns", *, step_wise: bool = True
) -> tuple[Trajectory, ScriptedEngine]:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: replies[len(engine.requests) - 1])
    chat_template = ChatTemplate(tokenizer, template=template, step_wise=step_wise)
    collector = Collector(engine, chat_template, LIMITS, env_configs={})
    prompts = [Prompt("0", [{"role": "user", "content": "go"}], env_class)]
    groups = asyncio.run(collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=40))))
    collector.close()
    return groups[0].trajectories[0], engine


def read_by(engine: ScriptedEngine) -> list[str]:
    return [engine.tokenizer.decode(request.prompt_ids) for request in engine.requests]


def test_where_the_template_keeps_the_history_tokens_are_those_of_appending():
    step_wise, engine = play(None, ["a", "second", "third"])
    appended, _ = play(None, ["a", "second", "third"], step_wise=False)
    assert step_wise.turns == appended.turns
    [sample] = to_samples([step_wise])
    assert trained(sample) == [pair for completion in engine.completions for pair in sampled(completion)]
    assert [reward for reward in sample.rewards if reward] == [1.0, 2.0, 4.0]


def test_a_template_that_forgets_reasoning_is_read_as_it_prints_and_every_reply_is_trained_once():
    trajectory, engine = play(FORGETS, REPLIES)
    history: list[Any] = [message("user", "go")]
    printed = []
    for number, reply in enumerate(REPLIES, 1):
        printed.append(render(engine.tokenizer, history, chat_template=FORGETS))
        history += [message("assistant", reply), message("user", f"[{number}]")]
    assert read_by(engine) == printed
    assert "hm" not in printed[1]
    first, rest = to_samples([trajectory])  # turn 2 follows another history; turn 3 goes on from turn 2
    assert trained(first) == sampled(engine.completions[0])
    assert trained(rest) == [*sampled(engine.completions[1]), *sampled(engine.completions[2])]
    assert first.trajectory_id == rest.trajectory_id == "0_0"
    assert ([r for r in first.rewards if r], [r for r in rest.rewards if r]) == ([1.0], [2.0, 4.0])


def test_a_reply_stays_in_the_tokens_that_were_sampled_where_encoding_its_text_gives_others():
    tokenizer = tiny_tokenizer()
    letters = tokenizer.encode("ab", add_special_tokens=False)
    tokenizer.add_tokens(["ab"])
    chat = ChatTemplate(tokenizer, step_wise=True).start([message("user", "go")])
    assert isinstance(chat, StepWiseChat)
    before, reply = chat.ids, [*letters, tokenizer.eos_token_id]
    chat.append(reply, [message("user", "on")])
    assert chat.ids[: len(before) + 3] == before + reply
    again = tokenizer.encode(chat.printed, add_special_tokens=False)
    assert len(again) == len(chat.ids) - 1
    assert tokenizer.decode(again) == tokenizer.decode(chat.ids)


def test_white_space_that_the_template_trims_opens_a_new_sample():
    trajectory, engine = play(TRIMS, ["a ", "b", "c"])
    assert "a<|im_end|>" in read_by(engine)[1]
    first, rest = to_samples([trajectory])
    assert engine.tokenizer.decode([token for token, _ in trained(first)]) == "a <|im_end|>"
    assert trained(rest) == [*sampled(engine.completions[1]), *sampled(engine.completions[2])]


def test_a_special_token_within_a_reply_stays_in_the_history():
    trajectory, engine = play(None, ["a", SECOND, "c"])
    assert SECOND in read_by(engine)[2]
    [sample] = to_samples([trajectory])
    assert trained(sample) == [pair for completion in engine.completions for pair in sampled(completion)]


def test_an_environments_edit_is_what_the_template_prints():
    trajectory, engine = play(None, ["too long", "second", "third"], "editing")
    assert [text.count("short<|im_end|>") for text in read_by(engine)] == [0, 1, 1]
    first, rest = to_samples([trajectory])
    assert trained(first) == sampled(engine.completions[0])
    assert trained(rest) == [*sampled(engine.completions[1]), *sampled(engine.completions[2])]


def test_a_reply_cut_by_its_length_is_closed_by_the_template_and_goes_on():
    trajectory, engine = play(None, ["x" * 50, "b", "c"])
    [sample] = to_samples([trajectory])
    assert trained(sample)[:40] == sampled(engine.completions[0])


def test_a_reply_that_another_end_token_closed_is_printed_with_the_templates_end():
    name = "HuggingFaceTB-SmolLM2-135M-Instruct"
    ends, _ = FAMILIES[name]
    tokenizer = byte_tokenizer(source_of(name), ends, eos=ends[0])
    printed_end, other_end = "<|im_end|>", "<|endoftext|>"
    template = ChatTemplate(tokenizer, end_ids=ids_of(tokenizer, ends), step_wise=True)
    opening = [message("user", "Where to?")]
    chat = StepWiseChat.of(template, opening)
    chat.append(tokenizer.encode(f"north{other_end}", add_special_tokens=False), [message("user", "And now?")])
    read = tokenizer.decode(chat.ids)
    assert f"north{printed_end}" in read
    assert other_end not in read
    assert read == render(tokenizer, [*opening, message("assistant", "north"), message("user", "And now?")])


@pytest.mark.parametrize("name", [name for name, (_, setting) in FAMILIES.items() if setting != REFUSED])
def test_published_templates_are_read_as_they_print(name):
    """Also those whose turns can be appended only with a switch, and those that leave reasoning out."""
    end = family_end(name)
    tokenizer = byte_tokenizer(source_of(name), FAMILIES[name][0], eos=FAMILIES[name][0][0])
    template = ChatTemplate(tokenizer, step_wise=True, end_ids=ids_of(tokenizer, FAMILIES[name][0]))
    history = [message("user", "go")]
    chat = template.start(history)
    for reply in REPLIES:
        assert tokenizer.decode(chat.ids) == render(tokenizer, history)
        history += [message("assistant", reply), message("user", "on")]
        chat.append(tokenizer.encode(reply + end, add_special_tokens=False), [history[-1]])
    assert tokenizer.decode(chat.ids) == render(tokenizer, history)


@pytest.mark.parametrize("spaces", ["before every piece", "before the text", "nowhere"])
def test_tokenizers_that_put_a_space_in_front_keep_the_sampled_tokens(spaces):
    tokenizer = space_tokenizer(FORGETS, ["<|im_start|>", "<|im_end|>"], spaces)
    template = ChatTemplate(tokenizer, template=FORGETS, step_wise=True, end_ids=tokenizer.encode("<|im_end|>")[-1:])
    chat = template.start([message("user", "go")])
    reply = [*tokenizer.encode("a b", add_special_tokens=False)[-3:], template.end_ids[0]]
    before = chat.ids
    chat.append(reply, [message("user", "on")])
    assert chat.ids[: len(before) + len(reply)] == before + reply


def test_the_refusal_of_a_template_that_cannot_be_appended_to_names_the_setting():
    with pytest.raises(TemplateRefused, match=r"generator\.step_wise_trajectories=true"):
        ChatTemplate(tiny_tokenizer(), template=FORGETS.replace("assistant\n{% e", "assistant\n<think>{% e"))


def test_an_agents_conversation_is_printed_anew_too():
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, template=FORGETS, step_wise=True)
    session = AgentSession("s", template, SamplingParams(max_tokens=9), SessionLimits(None, 300, 512), seed=1)
    for reply, goes_on in (("<think>hm</think>a", False), ("b", True)):
        messages = [message("user", "go")]
        prompt = session.prompt_of(messages, [])
        engine = ScriptedEngine(tokenizer, lambda request, reply=reply: reply)
        completion = asyncio.run(engine.generate(Request(prompt, session.sampling, "s")))
        session.calls = [Call(messages, prompt, completion)]
        later = [*messages, message("assistant", reply), message("user", "on")]
        again = session.prompt_of(later, [])
        assert tokenizer.decode(again) == render(tokenizer, later, chat_template=FORGETS)
        assert (again[: len(prompt) + len(completion.response_ids)] == prompt + completion.response_ids) == goes_on


def test_a_conversation_to_imitate_that_the_template_edits_is_refused():
    template = ChatTemplate(tiny_tokenizer(), template=FORGETS, step_wise=True)
    plain = [message("user", "go"), message("assistant", "b"), message("user", "on"), message("assistant", "c")]
    kept = sample_of(plain, template, "row 0")
    appended = sample_of(plain, ChatTemplate(tiny_tokenizer()), "row 0")
    assert (kept.input_ids, kept.loss_mask) == (appended.input_ids, appended.loss_mask)
    with pytest.raises(DataError, match="row 1: the chat template edits earlier turns"):
        sample_of([plain[0], message("assistant", REPLIES[0]), *plain[2:]], template, "row 1")


@pytest.mark.parametrize(
    "other",
    [
        "generator.batched=true",
        "generator.use_conversation_multi_turn=false",
        "generator.chat_template.keep_thinking=true",
        "generator.append_eos_token_after_stop_str_in_multi_turn=false",
    ],
)
def test_settings_that_contradict_it_are_refused_by_name(other):
    load_config(["generator.step_wise_trajectories=true"])
    with pytest.raises(ConfigError, match="drop") as refused:
        load_config(["generator.step_wise_trajectories=true", other])
    assert other.partition("=")[0] in str(refused.value)
    assert "step_wise_trajectories" in str(refused.value)
