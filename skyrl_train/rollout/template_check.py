"""A check that turns can be appended to a chat template: the model then reads exactly what the template prints.

Checked once, before anything is loaded, with words of our own: a conversation is printed after every turn, and each
printing must begin with the one before and go on with the reply, its end of turn, the observation and the next header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any

from skyrl_train.types import Message

if TYPE_CHECKING:
    from skyrl_train.rollout.chat import ChatTemplate

NUM_TURNS = 4
# Switches by which published templates keep earlier turns as the model read them.
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "preserve_thinking": (True,),
    "clear_thinking": (False,),
    "truncate_history_thinking": (False,),
}

_THINKING = re.compile("think|thought|reason", re.IGNORECASE)
_THINKING_TAGS = re.compile(r"(\s|<[^<>]*(think|thought)[^<>]*>)*", re.IGNORECASE)


class TemplateRefused(ValueError):
    """A chat template that cannot print a conversation, or not so that it can be appended to; with the reason."""


def check_opening(template: ChatTemplate, roles: Sequence[str]) -> None:
    """Raise TemplateRefused if the template does not print messages of these roles, or leaves one of them out."""
    messages = _opening(roles)
    _check_all_are_in(template.render(messages, add_generation_prompt=True), messages)


def check_observation(template: ChatTemplate, roles: Sequence[str]) -> None:
    """Raise TemplateRefused if the template does not print an observation of messages with these roles."""
    messages = _opening(roles)
    if template.step_wise:  # the template may change what the assistant said, so nothing is found by its place
        opening = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
        printed = template.render([*opening, *messages], add_generation_prompt=True)
    else:
        printed = template.tokenizer.decode(template.between(messages))
    _check_all_are_in(printed, messages)


def prints_tools(template: ChatTemplate, tools: Sequence[dict[str, Any]]) -> bool:
    """Return whether the template prints these tools, which are among its arguments, and appends what they answer."""
    try:
        printed = template.render(_opening(["user"]), add_generation_prompt=True)
        if template.step_wise:
            check_observation(template, ["tool"])
        else:
            check_growth(template, ["user"], "tool")
    except TemplateRefused:
        return False
    return all(tool["function"]["name"] in printed for tool in tools)


def check_growth(template: ChatTemplate, roles: Sequence[str], answers: str = "user") -> None:
    """Raise TemplateRefused if a conversation that begins with these roles does not grow as the template prints it.

    answers: the role of what follows a reply.
    """
    messages = _opening(roles)
    read = template.render(messages, add_generation_prompt=True)
    for turn in range(NUM_TURNS):
        closed = template.render(messages, add_generation_prompt=False)
        reply, observation = f"reply{turn}q7", [{"role": answers, "content": f"observation{turn}q7"}]
        messages = [*messages, {"role": "assistant", "content": reply}, *observation]
        printed = template.render(messages, add_generation_prompt=True)
        _check_all_are_in(printed, messages)
        before, _, behind = printed.partition(reply)
        _check_before(template, closed, read, before)
        _check_behind(template, printed, behind, observation)
        read = printed


def ways_out(template: ChatTemplate, roles: Sequence[str]) -> str:
    """Return what a user can do whose template is refused: settings that would help were tried."""
    ways = [
        *_helpful_switches(template, roles),
        "generator.step_wise_trajectories=true (each turn reads the history as the template prints it then)",
        "generator.use_conversation_multi_turn=false (the whole episode is one message)",
        "generator.max_turns=1",
        "a Jinja file of your own with generator.chat_template.source=file generator.chat_template.name_or_path=FILE",
    ]
    return f"What helps: {'; or '.join(ways)}"


def _helpful_switches(template: ChatTemplate, roles: Sequence[str]) -> Iterator[str]:
    """Yield the smallest set of the template's switches, and our own, under which turns can be appended."""
    source = str(template.template_kwargs.get("chat_template") or template.tokenizer.chat_template)
    names = [name for name in _SWITCHES if name in source]
    tried = [dict(zip(names, values, strict=True)) for values in product(*((None, *_SWITCHES[n]) for n in names))]
    sets = [{name: value for name, value in switches.items() if value is not None} for switches in tried]
    for switches in sorted(sets, key=len):
        if switches and _grows(template.changed(switches, keep_thinking=template.keep_thinking), roles):
            yield " ".join(f"generator.chat_template_kwargs.{name}={str(v).lower()}" for name, v in switches.items())
            break
    if not template.keep_thinking and _grows(template.changed({}, keep_thinking=True), roles):
        yield "generator.chat_template.keep_thinking=true (earlier turns stay as the model read and said them)"


def _grows(template: ChatTemplate, roles: Sequence[str]) -> bool:
    try:
        check_growth(template, roles)
    except TemplateRefused:
        return False
    return True


def _opening(roles: Sequence[str]) -> list[Message]:
    """Return messages of these roles, each with a word that stands nowhere else."""
    return [{"role": role, "content": f"message{number}q7"} for number, role in enumerate(roles)]


def _check_all_are_in(printed: str, messages: Sequence[Message]) -> None:
    for message in messages:
        if message["content"] not in printed:
            raise TemplateRefused(f"the chat template leaves out or changes a message of the role {message['role']!r}")


def _check_before(template: ChatTemplate, closed: str, read: str, before: str) -> None:
    """Check that the template prints in front of a reply what the model read when it gave that reply.

    closed: the text up to the header that was read last. White space is the reply's own: the model says it where the
    template prints it. With `keep_thinking` marks of thinking may differ between the header and the reply.
    """
    num_same = _num_same(read, before)
    if num_same == len(read) and not before[num_same:].strip():
        return
    tag = read.rfind("<", 0, num_same)
    is_within_tag = tag >= 0 and ">" not in read[tag:num_same]
    begin = tag if is_within_tag else num_same  # compare from the start of a tag that differs
    only_thinking = _THINKING.search(read[begin:]) or not read[begin:].strip()
    only_thinking = only_thinking and _THINKING_TAGS.fullmatch(before[begin:])
    if template.keep_thinking and only_thinking and begin >= _num_same(closed, read):
        return
    where = max(0, num_same - 20)
    raise TemplateRefused(
        f"the model replies to {_short(read[where:])}, which the chat template prints as {_short(before[where:])} "
        "once the conversation goes on"
    )


def _check_behind(template: ChatTemplate, printed: str, behind: str, observation: Sequence[Message]) -> None:
    """Check that the tokens we append behind a reply begin with an end of turn and are what the template prints."""
    decode, encode = template.tokenizer.decode, partial(template.tokenizer.encode, add_special_tokens=False)
    between = template.from_end(encode(behind))
    if not between or between[0] not in template.end_ids:
        ends = ", ".join(repr(decode([token])) for token in template.end_ids) or "none is known"
        is_special = between[:1] and between[0] in template.tokenizer.get_added_vocab().values()
        hint = f". If it was taught to end its turns so, add {between[0]} to its generation config's eos_token_id"
        raise TemplateRefused(
            f"behind an assistant's message the chat template prints {_short(behind)}, and the model's replies end "
            f"with {ends}{hint if is_special else ''}"
        )
    if template.between(observation) != between or encode(printed)[-len(between) :] != between:
        ours = decode(template.between(observation))
        raise TemplateRefused(
            f"behind a reply the model would read {_short(ours)}, where the chat template prints {_short(behind)}"
        )


def _num_same(one: str, other: str) -> int:
    """Return how many characters both texts begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}…")
