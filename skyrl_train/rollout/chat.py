"""Messages to tokens and back, append-only: what the engine sampled stays in the history token for token.

Only what the environment says is ever encoded; a reply is never decoded and encoded again. So the tokens that are
trained on are the tokens that were sampled, and a sample is a plain concatenation of its turns. What stands between two
replies is cut out of a conversation that goes on; template_check.py compares the result with what the template prints.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from jinja2 import TemplateError

from skyrl_gym.core import EnvFailure
from skyrl_train.engine.base import Completion
from skyrl_train.files import user_path
from skyrl_train.rollout.encoding import Encoder
from skyrl_train.rollout.step_wise import StepWiseChat
from skyrl_train.rollout.template_check import (
    TemplateRefused,
    check_growth,
    check_observation,
    check_opening,
    prints_tools,
    ways_out,
)
from skyrl_train.rollout.tools_in_words import with_tools_in_words
from skyrl_train.types import Message

# A placeholder for the reply: its place in the template's text is the place of the reply.
REPLY = "reply7c1e"
MAX_TOOL_SETS = 1000  # that are remembered; every episode may offer other tools
_CLOSED_TURN: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": REPLY}]
# Exceptions of a Jinja template that was not written for the given conversation.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def read_chat_template(source: str, name_or_path: str | None) -> str | None:
    """Return the Jinja text of `generator.chat_template`; None stands for the tokenizer's own template."""
    if name_or_path is None:
        return None
    if source != "file":
        raise ValueError(
            f"generator.chat_template.name_or_path={name_or_path!r} is no template known by name; give a Jinja file "
            "with generator.chat_template.source=file, or set switches of the model's own template, for example "
            "generator.chat_template_kwargs.enable_thinking=false"
        )
    path = user_path(name_or_path)
    if not path.is_file():
        raise ValueError(f"generator.chat_template.name_or_path={name_or_path!r}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"generator.chat_template.name_or_path={path} is not written in UTF-8 ({error})") from error


class ChatTemplate:
    """A tokenizer with the rules by which a conversation grows. One for the whole run.

    one_message: SkyRL's `generator.use_conversation_multi_turn=false`: the episode is a single assistant message, and
    observations are put into it as plain text. Otherwise every reply and every observation is a message of its own.
    end_ids: the tokens at which the engine ends a reply (end_of_turn.py); None is the tokenizer's own.
    grows: False if no episode has a second turn; then nothing is asked of the template but to print the prompt.
    keep_thinking: earlier turns stay as the model read and said them, where the template would print other marks of
    thinking between a header and a reply (`generator.chat_template.keep_thinking`).
    step_wise: the history is printed anew before every turn (step_wise.py), so the template may edit it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        one_message: bool = False,
        template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        append_eos_after_stop_string: bool = True,
        end_ids: Sequence[int] | None = None,
        grows: bool = True,
        keep_thinking: bool = False,
        step_wise: bool = False,
    ) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template: take an instruct model, or give a Jinja file with "
                "generator.chat_template.source=file generator.chat_template.name_or_path=FILE"
            )
        self.tokenizer = tokenizer
        self.encode_text = Encoder(tokenizer)
        self.one_message = one_message
        self.append_eos_after_stop_string = append_eos_after_stop_string
        self.template_kwargs = dict(template_kwargs or {})  # of apply_chat_template
        if template is not None:
            self.template_kwargs["chat_template"] = template
        own_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = own_end if end_ids is None else tuple(end_ids)
        self.keep_thinking = keep_thinking
        self.step_wise = step_wise
        self._grows = grows
        self._observations: set[tuple[str, ...]] = set()  # roles of observations that were checked
        self._offering: dict[str, Self] = {}  # by the tools
        self._prints_tools: bool | None = None
        self._tools_in_words: list[dict[str, Any]] = []  # tools that stand in plain text
        self.check(["user"], grows=grows)

    def check(self, roles: Sequence[str], *, grows: bool, answers: str = "user") -> None:
        """Raise TemplateRefused if conversations that begin with messages of these roles are not printed exactly.

        answers: the role of what the environment says behind a reply.
        """
        check_opening(self, roles)
        if self.one_message or not grows:
            return
        if self.step_wise:
            check_observation(self, [answers])
            return
        try:
            check_growth(self, roles, answers)
        except TemplateRefused as error:
            raise TemplateRefused(f"turns cannot be appended: {error}. {ways_out(self, roles)}") from error

    def changed(self, switches: dict[str, Any], *, keep_thinking: bool) -> Self:
        """Return the same template with these further arguments, unchecked."""
        other = copy.copy(self)
        other.template_kwargs = self.template_kwargs | switches
        other.keep_thinking = keep_thinking
        other.__dict__.pop("closes_turns", None)
        return other

    def offering(self, tools: list[dict[str, Any]]) -> Self:
        """Return the same template with tools for the model to call.

        Where the template prints tools and appends their answers, these are in the model's own form, else they stand
        in plain text. That is found out with the first tools. TemplateRefused: neither way can be appended to.
        """
        key = json.dumps(tools)
        if (known := self._offering.get(key)) is not None:
            return known
        if self._prints_tools is None:
            self._prints_tools = prints_tools(self._with_tools(tools, in_words=False), tools)
            self._with_tools(tools, in_words=not self._prints_tools).check(["user"], grows=self._grows, answers="tool")
        other = self._with_tools(tools, in_words=not self._prints_tools)
        if len(self._offering) < MAX_TOOL_SETS:
            self._offering[key] = other
        return other

    def _with_tools(self, tools: list[dict[str, Any]], *, in_words: bool) -> Self:
        other = self.changed({} if in_words else {"tools": tools}, keep_thinking=self.keep_thinking)
        other._tools_in_words = tools if in_words else []
        other._observations = set()
        return other

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the template's text of these messages."""
        if self._tools_in_words:
            messages = with_tools_in_words(messages, self._tools_in_words)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **self.template_kwargs
            )
        except _TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateRefused(f"the chat template does not print messages of {roles}: {error}") from error

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the tokens of the template's text of these messages."""
        return self.encode_text.again(self.render(messages, add_generation_prompt=add_generation_prompt))

    @cached_property
    def closes_turns(self) -> bool:
        """Return whether the template prints an end of turn behind a reply that nothing follows.

        If not (GLM), the turn ends with the first token of what follows: `<|user|>` ends a reply and opens a message.
        """
        return self._position_of_end(self._behind_reply([], add_generation_prompt=False)) is not None

    def start(self, messages: Sequence[Message], ids: list[int] | None = None) -> Chat | StepWiseChat:
        """Return a conversation that waits for a reply. EnvFailure if the template refuses the messages.

        ids: what the model has read of these messages, where that is known.
        """
        try:
            if self.step_wise:
                return StepWiseChat.of(self, messages, ids)
            return Chat(self, self.encode(messages, add_generation_prompt=True) if ids is None else ids)
        except TemplateRefused as error:
            raise EnvFailure(str(error)) from error

    def continuation(self, reply_ids: Sequence[int], observation: Sequence[Message]) -> list[int]:
        """Return the tokens between the last token of a reply and the first token of the next one.

            template            ...assistant\n REPLY <|im_end|> \n<|im_start|>user\n OBSERVATION ...assistant\n
            reply that ended    <|im_end|> was sampled: the tokens behind it
            reply that did not  with <|im_end|>, which is given, not sampled: its loss mask is False

        A reply that ended with another of the engine's ends keeps that one: it is what the policy sampled.
        """
        if self.one_message:
            text = "".join(message["content"] for message in observation)
            return self.encode_text(text)
        self.check_roles(tuple(message["role"] for message in observation))
        ids = self.between(observation)
        ended = bool(reply_ids) and reply_ids[-1] in self.end_ids
        if ended and (self.closes_turns or reply_ids[-1] == ids[0]):
            return ids[1:]
        return ids if ended or self.append_eos_after_stop_string or not self.closes_turns else ids[1:]

    def between(self, observation: Sequence[Message]) -> list[int]:
        """Return the tokens that the template prints between two replies, the end of the first one's turn included."""
        return self.from_end(self._behind_reply(observation, add_generation_prompt=True))

    def said(self, text: str, observation: Sequence[Message] | None) -> list[int]:
        """Return the tokens that a policy would sample to say this text: the text, and the end of its turn.

        observation: what follows, None behind the last reply. Within one message only the last reply has an end.
        """
        ids = self.encode_text(text)
        if self.one_message and observation is not None:
            return ids
        follows = observation or [{"role": "user", "content": "question"}]
        behind = self._behind_reply(follows, add_generation_prompt=True)
        return [*ids, behind[self._position_of_end(behind) or 0]]

    def from_end(self, ids: list[int]) -> list[int]:
        """Return what is printed behind a reply without the white space that the reply itself ends with."""
        return ids[self._position_of_end(ids) or 0 :]

    def _behind_reply(self, observation: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the tokens that the template prints behind an assistant's message, encoded on their own."""
        text = self.render([*_CLOSED_TURN, *observation], add_generation_prompt=add_generation_prompt)
        _, found, behind = text.partition(REPLY)
        if not found:
            raise TemplateRefused("the chat template leaves out or changes what the assistant said")
        return self.encode_text(behind)

    def _position_of_end(self, ids: list[int]) -> int | None:
        """Return the position of the end of turn, or None if anything but white space stands before it."""
        for position, token in enumerate(ids):
            if token in self.end_ids:
                return position
            if self.tokenizer.decode([token]).strip():
                break
        return None

    def check_roles(self, roles: tuple[str, ...]) -> None:
        """Raise TemplateRefused if the template does not print messages of these roles behind a reply."""
        if roles not in self._observations:
            check_observation(self, roles)
            self._observations.add(roles)


@dataclass
class Chat:
    """One growing conversation as tokens. `ids` is what the engine is given next."""

    template: ChatTemplate
    ids: list[int] = field(default_factory=list)

    def kept(self, completion: Completion) -> tuple[list[int], list[float]]:
        """Return the sampled tokens that stay in the history, and their logprobs, when the conversation goes on.

        Within one message the token that ended a reply must not stand in the middle. It is the only sampled token that
        is ever left out, so it is not trained on either.
        """
        ids, logprobs = completion.response_ids, completion.logprobs
        if self.template.one_message and ids and ids[-1] in self.template.end_ids:
            return ids[:-1], logprobs[:-1]
        return ids, logprobs

    def append(self, reply_ids: list[int], observation: Sequence[Message]) -> None:
        """Append a reply and the environment's answer. Raises EnvFailure if the template does not print the answer."""
        try:
            self.ids = [*self.ids, *reply_ids, *self.template.continuation(reply_ids, observation)]
        except TemplateRefused as error:
            raise EnvFailure(str(error)) from error

    def append_edited(self, text: str, observation: Sequence[Message]) -> None:
        """Append `text`, with which the environment replaced the reply, and the environment's answer.

        The policy did not sample these tokens, so they are not trained, and the next turn opens a new sample.
        """
        self.append(self.template.encode_text(text), observation)
