"""Real templates: each is appended to exactly as it prints itself, tokens and masks over four turns, or refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from skyrl_train.batch.samples import to_samples
from skyrl_train.engine.base import Completion
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.template_check import TemplateRefused
from skyrl_train.types import EpisodeEnd, Message, Prompt, Trajectory, Turn
from tests.real_templates import (
    TEMPLATES,
    byte_tokenizer,
    llama3_tokenizer,
    message,
    printed_end,
    qwen_tokenizer,
    render,
    source_of,
    space_tokenizer,
)

REPLIES = ["go north", "Take 7!", "ünïcode ok", "stop"]
OBSERVATIONS = ["you see a <door>", "3 left", "it's\n\nopen", "?"]
OPENINGS = [
    [message("user", "Where to?")],
    [message("system", "Be brief."), message("user", "Where to?")],
    [message("user", "Where to?"), message("assistant", "home"), message("user", "And now?")],
]
CHATML, LLAMA, GEMMA = ["<|im_end|>", "<|endoftext|>"], ["<|end_of_text|>", "<|eot_id|>"], ["<eos>", "<end_of_turn>"]
SWITCH = re.compile(r"chat_template_kwargs\.(\w+)=(true|false)")
GLM, PHI = ["<|endoftext|>", "<|user|>", "<|observation|>"], ["<|endoftext|>", "<|end|>"]
# README's table: template -> the published ends (the tokenizer's own first), and the setting that several turns need.
AS_IT_IS, NO_THINKING, KEEP, REFUSED = "nothing", "enable_thinking=false", "keep_thinking=true", "refused"
FAMILIES = {
    "Qwen-Qwen2.5-7B-Instruct": (CHATML, AS_IT_IS),
    "Qwen-Qwen3-0.6B": (CHATML, AS_IT_IS),
    "Qwen-Qwen3-0.6B@a55ee1": (CHATML, AS_IT_IS),
    "Qwen-Qwen3-4B-Instruct-2507": (CHATML, AS_IT_IS),
    "Qwen-Qwen3-4B-Thinking-2507": (CHATML, KEEP),
    "Qwen-Qwen3.5-0.8B": (CHATML, KEEP),
    "Qwen-QwQ-32B@16488a": (CHATML, KEEP),
    "HuggingFaceTB-SmolLM2-135M-Instruct": (CHATML, AS_IT_IS),
    "HuggingFaceTB-SmolLM3-3B": (CHATML, AS_IT_IS),
    "meta-llama-Llama-3.1-8B-Instruct": (LLAMA, AS_IT_IS),
    "meta-llama-Llama-3.2-3B-Instruct": (LLAMA, AS_IT_IS),
    "google-gemma-2-2b-it": (GEMMA, AS_IT_IS),
    "unsloth-gemma-3-270m-it": (GEMMA, AS_IT_IS),
    "google-gemma-4-E4B-it": (["<eos>", "<turn|>"], AS_IT_IS),
    "microsoft-Phi-3-mini-4k-instruct": (PHI, AS_IT_IS),
    "microsoft-Phi-3.5-mini-instruct": (PHI, AS_IT_IS),
    "microsoft-Phi-4-multimodal-instruct": (PHI, AS_IT_IS),  # Phi-4-mini-instruct has the same
    "microsoft-phi-4": (CHATML, AS_IT_IS),
    "mistralai-Mistral-7B-Instruct-v0.2": (["</s>"], AS_IT_IS),
    "mistralai-Mistral-7B-Instruct-v0.3": (["</s>"], AS_IT_IS),
    "mistralai-Mistral-Small-24B-Instruct-2501": (["</s>"], AS_IT_IS),
    "zai-org-GLM-4-9B-0414": (GLM, AS_IT_IS),
    "zai-org-glm-4-9b-chat": (GLM, AS_IT_IS),
    "zai-org-GLM-4.5-Air": (GLM, NO_THINKING),
    "GLM-4.7-Flash": (GLM, NO_THINKING),
    "allenai-Olmo-3-7B-Instruct": (CHATML, AS_IT_IS),
    "ibm-granite-granite-4.0": (["<|end_of_text|>"], AS_IT_IS),
    "tiiuae-Falcon3-7B-Instruct": (["<|endoftext|>"], AS_IT_IS),
    "internlm-internlm2_5-7b-chat": (["</s>", "<|im_end|>"], AS_IT_IS),
    "internlm-Intern-S1-mini": (CHATML, NO_THINKING),
    "LiquidAI-LFM2-1.2B": (["<|im_end|>"], AS_IT_IS),
    "LGAI-EXAONE-EXAONE-3.5-7.8B-Instruct": (["[|endofturn|]"], AS_IT_IS),
    "01-ai-Yi-1.5-9B-Chat": (CHATML, AS_IT_IS),
    "moonshotai-Kimi-K2-Instruct": (["<|im_end|>", "[EOS]"], AS_IT_IS),
    "deepseek-ai-DeepSeek-V3.1": (["<｜end▁of▁sentence｜>"], AS_IT_IS),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": (["<｜end▁of▁sentence｜>"], KEEP),
    "nvidia-NVIDIA-Nemotron-Nano-12B-v2": (["<SPECIAL_12>"], KEEP),
    "openai-gpt-oss-120b": (["<|return|>", "<|call|>"], REFUSED),
}


def ids_of(tokenizer: Any, ends: Sequence[str]) -> list[int]:
    return sorted({tokenizer.convert_tokens_to_ids(end) for end in ends})


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def play(template: ChatTemplate, opening: list[Message], end: str, answers: str = "user") -> str:
    """Play four turns with an engine that says what the template prints for a reply. Return what differed, or nothing.

    Expected is cut out of the tokens of the template's own text: what stands there between a prompt and the end of the
    reply's turn was sampled, all else was given.
    """
    tokenizer, kwargs = template.tokenizer, template.template_kwargs
    messages, chat = list(opening), template.start(opening)
    turns: list[Turn] = []
    expected: list[tuple[int, bool]] = []
    for reply, observation in zip(REPLIES, OBSERVATIONS, strict=True):
        prompt = encode(tokenizer, render(tokenizer, messages, **kwargs))
        messages += [message("assistant", reply), message(answers, observation)]
        after = encode(tokenizer, render(tokenizer, messages, **kwargs))
        said = after[len(prompt) : after.index(tokenizer.convert_tokens_to_ids(end), len(prompt)) + 1]
        if after[: len(prompt)] != prompt or tokenizer.decode(said[:-1]).strip() != reply:
            return f"{tokenizer.decode(after)!r} does not go on where {tokenizer.decode(prompt)!r} ends"
        if chat.ids != prompt:
            return f"read {tokenizer.decode(chat.ids)!r}, printed {tokenizer.decode(prompt)!r}"
        expected += [(token, False) for token in prompt[len(expected) :]] + [(token, True) for token in said]
        logprobs = [-0.1 * (1 + n % 7) for n in range(len(said))]
        kept, kept_logprobs = chat.kept(Completion(reply, said, logprobs, "stop", 0))
        turns.append(Turn(chat.ids, kept, kept_logprobs, 0.5, reply, "stop", 0, [messages[-1]]))
        chat.append(kept, [messages[-1]])
    [sample] = to_samples([trajectory(opening, turns)])
    if list(zip(sample.input_ids, sample.loss_mask, strict=True)) != expected:
        return f"tokens or masks of {tokenizer.decode(sample.input_ids)!r} are not the template's"
    return ""


def trajectory(opening: list[Message], turns: list[Turn]) -> Trajectory:
    prompt = Prompt(uid="0", messages=opening, env_class="none", env_extras={})
    return Trajectory(
        prompt=prompt, repetition=0, seed=0, messages=opening, turns=turns, end=EpisodeEnd.FINISHED, env_metrics={}
    )


def played(template: ChatTemplate, end: str) -> Counter[str]:
    """The openings that the template accepts, played; others are counted as refused, with a reason."""
    counts: Counter[str] = Counter()
    for opening in OPENINGS:
        try:
            if opening is not OPENINGS[0]:  # which was checked when the template was made
                template.check([part["role"] for part in opening], grows=True)
        except TemplateRefused:
            counts["refused"] += 1
        else:
            assert play(template, opening, end) == ""
            counts["exact"] += 1
    return counts


def play_kept(template: ChatTemplate, end: str) -> str:
    """Play with `keep_thinking`: all that the template prints behind a reply follows what was read and said so far."""
    tokenizer, messages = template.tokenizer, list(OPENINGS[0])
    chat = template.start(messages)
    for reply, observation in zip(REPLIES, OBSERVATIONS, strict=True):
        messages += [message("assistant", reply), message("user", observation)]
        behind = render(tokenizer, messages).partition(reply)[2].partition(end)[2]
        said = encode(tokenizer, reply + end)
        expected = chat.ids + said + encode(tokenizer, behind)
        chat.append(said, [messages[-1]])
        if chat.ids != expected:
            return f"read {tokenizer.decode(chat.ids)!r} instead of {tokenizer.decode(expected)!r}"
    return ""


def outcomes(name: str) -> Iterator[str]:
    """Yield whether a template is exact with an engine that ends at the template's own end of a reply.

    If it is refused, yields which switch, or keeping the thinking, makes it exact.
    """
    end = printed_end(source_of(name)) or "</s>"
    tokenizer = byte_tokenizer(source_of(name), [end])
    make = partial(ChatTemplate, tokenizer, end_ids=ids_of(tokenizer, [end, "</s>"]))
    try:
        counts = played(make(), end)
    except TemplateRefused as refusal:
        switches = {key: value == "true" for key, value in SWITCH.findall(str(refusal))}
        keeps = "keep_thinking=true" in str(refusal)
        yield "exact with a switch" if switches else "kept" if keeps else "refused"
        if switches:
            assert play(make(template_kwargs=switches), OPENINGS[0], end) == ""
        if keeps:
            assert play_kept(make(keep_thinking=True), end) == ""
        return
    yield "exact"
    yield from (f"{how} opening" for how in counts.elements())
    if "enable_thinking" in source_of(name):
        with suppress(TemplateRefused):
            assert play(make(template_kwargs={"enable_thinking": False}), OPENINGS[0], end) == ""
            yield "exact without thinking"


def test_every_real_template_is_appended_to_exactly_or_refused_at_start_up():
    """786 templates, three kinds of prompts, four turns: token ids and loss masks; README has these numbers."""
    counts = Counter(outcome for name in TEMPLATES for outcome in outcomes(name))
    assert counts["exact opening"] >= 1300
    assert counts["exact without thinking"] >= 10
    by_outcome = [counts[outcome] for outcome in ("exact", "exact with a switch", "kept", "refused")]
    assert by_outcome == [506, 63, 87, 130]
    assert sum(by_outcome) == len(TEMPLATES)


def family(name: str, **options: Any) -> ChatTemplate:
    ends, _ = FAMILIES[name]
    tokenizer = byte_tokenizer(source_of(name), ends, eos=ends[0])
    return ChatTemplate(tokenizer, end_ids=ids_of(tokenizer, ends), **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_work_with_the_setting_that_the_readme_names(name):
    setting = FAMILIES[name][1]
    if setting == AS_IT_IS:
        assert played(family(name), family_end(name))["exact"] >= 1
        return
    with pytest.raises(TemplateRefused) as refusal:
        family(name)
    assert (setting in str(refusal.value)) == (setting != REFUSED)
    if setting == NO_THINKING:
        assert play(family(name, template_kwargs={"enable_thinking": False}), OPENINGS[0], family_end(name)) == ""


def family_end(name: str) -> str:
    ends, _ = FAMILIES[name]
    printed = printed_end(source_of(name), ends[0])
    assert printed in ends
    return printed


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "open_door",
            "description": "Open a door.",
            "parameters": {"type": "object", "properties": {"door": {"type": "integer"}}, "required": ["door"]},
        },
    }
]
CALLED = {"type": "function", "function": {"name": "open_door", "arguments": {"door": 7}}}
# What the template prints of the tools, of a call of the model's, and of what a tool answers.
PRINTS_TOOLS = {
    "Qwen-Qwen2.5-7B-Instruct": ("<tools>", "<tool_call>", "<|im_start|>user\n<tool_response>\nopen\n</tool_response>"),
    "Qwen-Qwen3-0.6B": ("<tools>", "<tool_call>", "<|im_start|>user\n<tool_response>\nopen\n</tool_response>"),
    "Qwen-Qwen3-4B-Instruct-2507": ("<tools>", "<tool_call>", "<tool_response>\nopen\n</tool_response>"),
    "meta-llama-Llama-3.1-8B-Instruct": (
        "Environment: ipython",
        '"parameters": {"door": 7}',
        "ipython<|end_header_id|>",
    ),
    "meta-llama-Llama-3.2-3B-Instruct": (
        "Environment: ipython",
        '"parameters": {"door": 7}',
        "ipython<|end_header_id|>",
    ),
    "allenai-Olmo-3-7B-Instruct": ("<functions>", "<function_calls>", "<|im_start|>environment\nopen"),
    "moonshotai-Kimi-K2-Instruct": ("tool_declare", "<|tool_call_begin|>", "open"),
}


@pytest.mark.parametrize("name", PRINTS_TOOLS)
def test_tools_calls_and_answers_stand_in_the_templates_own_form_and_are_appended_to_exactly(name):
    template = family(name).offering(TOOLS)
    assert template is not family(name)
    offered, called, answered = PRINTS_TOOLS[name]
    example = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    opening = [message("user", "Go."), example, message("user", "Again.")]
    printed = template.tokenizer.decode(template.start(opening).ids)
    assert offered in printed
    assert "open_door" in printed
    assert called in printed.partition("Go.")[2]
    chat = template.start([message("user", "Go.")])
    chat.append(encode(template.tokenizer, f"x{family_end(name)}"), [message("tool", "open")])
    assert answered in template.tokenizer.decode(chat.ids).partition(f"x{family_end(name)}")[2]
    assert play(template, [message("user", "Where to?")], family_end(name), "tool") == ""


@pytest.mark.parametrize("name", ["HuggingFaceTB-SmolLM2-135M-Instruct", "google-gemma-2-2b-it", "microsoft-phi-4"])
def test_where_the_template_prints_no_tools_they_stand_in_words(name):
    whole = family(name)
    template = whole.offering(TOOLS)
    example = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    printed = template.tokenizer.decode(
        template.start([message("user", "Go."), example, message("user", "Again.")]).ids
    )
    assert '"name": "open_door", "description"' in printed
    assert '<tool_call>{"name": "open_door", "arguments": {"door": 7}}</tool_call>' in printed.partition("Go.")[2]
    chat = template.start([message("user", "Go.")])
    chat.append(encode(template.tokenizer, f"x{family_end(name)}"), [message("tool", "open")])
    behind = template.tokenizer.decode(chat.ids).rpartition("x<")[2]
    assert "user" in behind
    assert "<tool_response>\nopen\n</tool_response>" in behind
    assert whole.offering(TOOLS) is template
    assert "open_door" not in whole.tokenizer.decode(whole.start([message("user", "Go.")]).ids)


def test_a_template_that_can_neither_is_refused():
    template = family("openai-gpt-oss-120b", grows=False)
    template._grows = True
    with pytest.raises(TemplateRefused, match="turns cannot be appended"):
        template.offering(TOOLS)


def test_thinking_marks_stay_where_the_template_would_take_them_out_if_that_is_asked_for():
    template = family("Qwen-Qwen3-4B-Thinking-2507", keep_thinking=True)
    chat = template.start([message("user", "a")])
    chat.append(encode(template.tokenizer, "so\n</think>\n\nb<|im_end|>"), [message("user", "c")])
    assert template.tokenizer.decode(chat.ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nso\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    with pytest.raises(TemplateRefused, match="leaves out or changes"):  # what it was not asked for is still refused
        ChatTemplate(byte_tokenizer("{{ messages[0].content }}"), keep_thinking=True)


def test_qwen3_without_thinking_needs_that_setting_too():
    """Its generation prompt then holds an empty thought that the template takes out of earlier turns."""
    switch = {"enable_thinking": False}
    with pytest.raises(TemplateRefused, match="keep_thinking=true"):
        family("Qwen-Qwen3-0.6B", template_kwargs=switch)
    family("Qwen-Qwen3-0.6B", template_kwargs=switch, keep_thinking=True)


def test_glm_ends_a_reply_with_the_header_of_the_next_message():
    template = family("zai-org-GLM-4-9B-0414")
    encoded = {}
    for end in GLM:
        chat = template.start([message("user", "a")])
        chat.append(encode(template.tokenizer, f"\nb{end}"), [message("user", "c")])
        encoded[end] = template.tokenizer.decode(chat.ids).partition("\nb")[2]
    assert encoded["<|user|>"] == "<|user|>\nc<|assistant|>"
    assert encoded["<|endoftext|>"] == "<|endoftext|><|user|>\nc<|assistant|>"
    assert encoded["<|observation|>"] == "<|observation|><|user|>\nc<|assistant|>"


def test_gemma_as_published_is_refused_only_without_its_generation_configuration():
    tokenizer = byte_tokenizer(source_of("google-gemma-2-2b-it"), eos="<eos>")
    with pytest.raises(TemplateRefused, match=r"<end_of_turn>.*eos_token_id"):
        ChatTemplate(tokenizer)
    template = ChatTemplate(tokenizer, end_ids=ids_of(tokenizer, GEMMA))
    chat = template.start([message("user", "a")])
    chat.append(
        encode(tokenizer, "b<eos>"), [message("user", "c")]
    )  # the other of its ends: it stays as it was sampled
    assert str(tokenizer.decode(chat.ids)).endswith(
        "model\nb<eos>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("Qwen")])
def test_in_qwens_vocabulary_what_stands_between_two_replies_is_whole(name):
    tokenizer, keep = qwen_tokenizer(), FAMILIES[name][1] == KEEP
    ends = ids_of(tokenizer, CHATML)
    template = ChatTemplate(tokenizer, template=source_of(name), end_ids=ends, keep_thinking=keep)
    between = str(tokenizer.decode(template.continuation([tokenizer.eos_token_id], [message("user", "hi back")])))
    assert between.startswith("\n<|im_start|>user\nhi back<|im_end|>\n<|im_start|>assistant\n")
    if not keep:
        assert play(template, OPENINGS[1], "<|im_end|>") == ""


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "NousResearch-Meta-Llama-3-8B-Instruct"])
def test_in_llamas_vocabulary_four_turns_are_exact(name):
    tokenizer = llama3_tokenizer()
    template = ChatTemplate(tokenizer, template=source_of(name), end_ids=ids_of(tokenizer, LLAMA))
    assert [play(template, opening, "<|eot_id|>") for opening in OPENINGS] == ["", "", ""]


@pytest.mark.parametrize("spaces", ["before every piece", "before the text", "as they are"])
@pytest.mark.parametrize(
    "name",
    [
        "codellama-CodeLlama-7b-Instruct-hf",
        "google-gemma-2-2b-it",
        "microsoft-Phi-3-mini-4k-instruct",
        "mistralai-Mistral-7B-Instruct-v0.2",
        "mistralai-Mistral-7B-Instruct-v0.3",
        "openchat-openchat-3.5-0106",
    ],
)
def test_tokenizers_that_put_a_space_before_a_text_are_exact_too(name, spaces):
    """As Llama's and Mistral's, old and new: a piece of a text is not encoded as the same piece inside the text."""
    end = printed_end(source_of(name)) or "</s>"
    tokenizer = space_tokenizer(source_of(name), [end, "</s>", "[INST]"], spaces)
    [first] = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))
    assert first == ("a" if spaces == "as they are" else "▁a")
    template = ChatTemplate(tokenizer, end_ids=ids_of(tokenizer, [end, "</s>"]))
    assert play(template, OPENINGS[0], end) == ""
