"""Chat: the history grows by whole pieces, and sampled tokens never change."""

from __future__ import annotations

import pytest

from skyrl_gym.core import EnvFailure
from skyrl_train.engine.base import Completion
from skyrl_train.rollout.chat import ChatTemplate, read_chat_template
from tests.fakes import varied_logprobs
from tests.tiny_models import CHATML, tiny_tokenizer

QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def completion(tokenizer, text: str) -> Completion:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, varied_logprobs(ids), "stop", 0)


def test_a_history_of_messages_is_what_the_template_would_print(tokenizer):
    chat = ChatTemplate(tokenizer).start(QUESTION)
    reply = completion(tokenizer, "yes<|im_end|>")
    chat.append(chat.kept(reply)[0], [{"role": "user", "content": "why"}])
    conversation = [*QUESTION, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    assert tokenizer.decode(chat.ids) == tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True
    )


def test_without_an_observation_the_template_still_closes_the_turn(tokenizer):
    chat = ChatTemplate(tokenizer).start(QUESTION)
    chat.append(completion(tokenizer, "yes<|im_end|>").response_ids, [])
    assert tokenizer.decode(chat.ids).endswith("assistant\nyes<|im_end|>\n<|im_start|>assistant\n")


def test_a_reply_cut_by_a_stop_string_gets_an_end_that_nobody_sampled(tokenizer):
    template = ChatTemplate(tokenizer)
    chat = template.start(QUESTION)
    reply = completion(tokenizer, "a</action>")
    chat.append(chat.kept(reply)[0], [{"role": "user", "content": "ok"}])
    assert "a</action><|im_end|>\n<|im_start|>user" in tokenizer.decode(chat.ids)

    without = ChatTemplate(tokenizer, append_eos_after_stop_string=False).start(QUESTION)
    without.append(reply.response_ids, [{"role": "user", "content": "ok"}])
    assert "a</action>\n<|im_start|>user" in tokenizer.decode(without.ids)


def test_one_message_holds_replies_and_observations_without_ends_between(tokenizer):
    chat = ChatTemplate(tokenizer, one_message=True).start(QUESTION)
    reply = completion(tokenizer, "<search>x</search><|im_end|>")
    ids, logprobs = chat.kept(reply)
    assert ids == reply.response_ids[:-1]
    assert logprobs == reply.logprobs[:-1]
    chat.append(ids, [{"role": "user", "content": "<information>y</information>"}])
    assert tokenizer.decode(chat.ids).endswith("assistant\n<search>x</search><information>y</information>")


def test_an_edited_reply_replaces_the_sampled_one_in_the_history(tokenizer):
    chat = ChatTemplate(tokenizer).start(QUESTION)
    chat.append_edited("short", [{"role": "user", "content": "ok"}])
    assert "assistant\nshort<|im_end|>\n<|im_start|>user\nok" in tokenizer.decode(chat.ids)


def test_template_arguments_reach_the_template(tokenizer):
    template = "{{ mood }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    chat = ChatTemplate(tokenizer, template=template, template_kwargs={"mood": "calm:"}).start(QUESTION)
    assert tokenizer.decode(chat.ids) == "calm:hi<|im_end|>"


def test_a_template_that_never_closes_a_turn_is_refused(tokenizer):
    with pytest.raises(ValueError, match="use_conversation_multi_turn=false"):
        ChatTemplate(tokenizer, template="{% for m in messages %}{{ m.content }}{% endfor %}")


def test_a_template_file_is_read_and_a_missing_one_named(tmp_path):
    (tmp_path / "mine.jinja").write_text("x")
    assert read_chat_template("file", str(tmp_path / "mine.jinja")) == "x"
    assert read_chat_template("name", None) is None
    with pytest.raises(ValueError, match="no such file"):
        read_chat_template("file", str(tmp_path / "other.jinja"))
    with pytest.raises(ValueError, match="enable_thinking"):
        read_chat_template("name", "qwen3_without_thinking")


def test_a_template_that_prints_the_last_reply_unlike_others_keeps_the_observations_header(tokenizer):
    """As Qwen3's: thinking marks stand in the last assistant's message only."""
    template = CHATML.replace(
        "message['content'] +",
        "('<think>' if loop.last and message.role == 'assistant' else '') + message['content'] +",
    )
    chat = ChatTemplate(tokenizer, template=template).start(QUESTION)
    chat.append(completion(tokenizer, "yes<|im_end|>").response_ids, [{"role": "user", "content": "hi back"}])
    assert tokenizer.decode(chat.ids).endswith(
        "yes<|im_end|>\n<|im_start|>user\nhi back<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_end_of_the_engine_closes_a_turn(tokenizer):
    other = tokenizer.convert_tokens_to_ids("!")
    chat = ChatTemplate(tokenizer, end_ids=[tokenizer.eos_token_id, other]).start(QUESTION)
    chat.append(completion(tokenizer, "yes!").response_ids, [{"role": "user", "content": "why"}])
    assert "yes!\n<|im_start|>user\nwhy" in tokenizer.decode(chat.ids)

    one_message = ChatTemplate(tokenizer, one_message=True, end_ids=[other]).start(QUESTION)
    assert one_message.kept(completion(tokenizer, "yes!"))[0] == tokenizer.encode("yes", add_special_tokens=False)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            "{% for message in messages if message.role != 'tool' %}",
            "leaves out or changes a message of the role 'tool'",
        ),
        (
            "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
            "no tools",
        ),
    ],
)
def test_an_observation_that_the_template_does_not_print_is_the_environments_failure(tokenizer, changed, reason):
    template = CHATML.replace("{% for message in messages %}", changed)
    chat = ChatTemplate(tokenizer, template=template).start(QUESTION)
    with pytest.raises(EnvFailure, match=reason):
        chat.append(completion(tokenizer, "yes<|im_end|>").response_ids, [{"role": "tool", "content": "4"}])


@pytest.mark.parametrize(
    "loop",
    [
        "{% for m in messages[-2:] %}",  # forgets
        "{% for m in messages | reverse %}",
        "{% for m in messages %}{{ loop.index }}",  # counts
        "{% for m in messages %}{{ messages | length }}",
        "{% for m in messages %}{% if loop.index > 3 %}{{ raise_exception('too long') }}{% endif %}",
        "{% for m in messages if m.role == 'user' or loop.last %}",
        "{% for m in messages %}{{ m.content + none }}",
        "{% for m in messages %}{{ 1 / 0 }}",
    ],
)
def test_templates_that_do_not_grow_by_their_end_are_refused(tokenizer, loop):
    body = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    ChatTemplate(
        tokenizer, template=f"{{% for m in messages %}}{body}{{% endfor %}}<|im_start|>assistant\n", grows=False
    )
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate(tokenizer, template=f"{loop}{body}{{% endfor %}}<|im_start|>assistant\n")
