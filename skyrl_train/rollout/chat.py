"""Messages to tokens and back, append-only: what the engine sampled stays in the history token for token.

Only what the environment says is ever encoded; a reply is never decoded and encoded again. So the tokens that are
trained on are the tokens that were sampled, and a sample is a plain concatenation of its turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.engine.base import Completion
from skyrl_train.types import Message

# What stands before an observation does not change how it is encoded, as long as an assistant's turn has just closed.
_CLOSED_TURN: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def read_chat_template(source: str, name_or_path: str | None) -> str | None:
    """The Jinja text of `generator.chat_template`; None is the tokenizer's own."""
    if name_or_path is None:
        return None
    if source != "file":
        raise ValueError(
            f"generator.chat_template.name_or_path={name_or_path!r} is no template known by name; give a Jinja file "
            "with generator.chat_template.source=file, or set switches of the model's own template, for example "
            "generator.chat_template_kwargs.enable_thinking=false"
        )
    path = Path(name_or_path).expanduser()
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
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        one_message: bool = False,
        template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        append_eos_after_stop_string: bool = True,
    ) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template: take an instruct model, or give a Jinja file with "
                "generator.chat_template.source=file generator.chat_template.name_or_path=FILE"
            )
        self.tokenizer = tokenizer
        self.one_message = one_message
        self.append_eos_after_stop_string = append_eos_after_stop_string
        self.template_kwargs = dict(template_kwargs or {})  # of apply_chat_template
        if template is not None:
            self.template_kwargs["chat_template"] = template
        self.eos_id: int = tokenizer.eos_token_id
        closed = self.encode(_CLOSED_TURN, add_generation_prompt=False)
        if not one_message and self.eos_id not in closed:
            raise ValueError(
                f"the chat template does not end an assistant's turn with the tokenizer's end-of-sequence token "
                f"{tokenizer.eos_token!r}, so turns cannot be appended; set generator.use_conversation_multi_turn=false"
            )
        # Tokens that the template puts behind that token (a newline, in ChatML) belong to what follows.
        self._num_closed = len(closed) - closed[::-1].index(self.eos_id) if self.eos_id in closed else len(closed)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        return self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,  # transformers 5 returns a mapping otherwise
            **self.template_kwargs,
        )

    def encode_observation(self, observation: Sequence[Message]) -> list[int]:
        """Everything between the end-of-sequence token of one reply and the first token of the next."""
        if self.one_message:
            text = "".join(message["content"] for message in observation)
            return self.tokenizer.encode(text, add_special_tokens=False)
        ids = self.encode([*_CLOSED_TURN, *observation], add_generation_prompt=True)
        return ids[self._num_closed :]

    def start(self, messages: Sequence[Message]) -> Chat:
        """A conversation that waits for the model's first reply."""
        return Chat(self, self.encode(messages, add_generation_prompt=True))


@dataclass
class Chat:
    """One growing conversation as tokens. `ids` is what the engine is given next."""

    template: ChatTemplate
    ids: list[int] = field(default_factory=list)

    def kept(self, completion: Completion) -> tuple[list[int], list[float]]:
        """The sampled tokens that stay in the history, and their logprobs, when the conversation goes on.

        Within one message the end-of-sequence token that closed a reply must not stand in the middle; it is the only
        sampled token that is ever left out, and it is not trained on either.
        """
        ids, logprobs = completion.response_ids, completion.logprobs
        if self.template.one_message and ids and ids[-1] == self.template.eos_id:
            return ids[:-1], logprobs[:-1]
        return ids, logprobs

    def append(self, reply_ids: list[int], observation: Sequence[Message]) -> None:
        """The reply, then what the environment answered."""
        history = [*self.ids, *reply_ids]
        ended = bool(reply_ids) and reply_ids[-1] == self.template.eos_id
        if not self.template.one_message and not ended and self.template.append_eos_after_stop_string:
            history.append(self.template.eos_id)  # given, not sampled: its loss mask is False
        self.ids = [*history, *self.template.encode_observation(observation)]

    def append_edited(self, text: str, observation: Sequence[Message]) -> None:
        """The environment replaced the reply by `text`: the history now holds tokens nobody sampled.

        They are encoded as given tokens, and the next turn opens a new sample.
        """
        self.append(self.template.tokenizer.encode(text, add_special_tokens=False), observation)
