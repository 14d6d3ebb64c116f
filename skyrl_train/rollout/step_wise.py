"""A conversation whose history is printed anew before every turn: SkyRL's `generator.step_wise_trajectories`.

The model then reads what it will read in use, also where the template edits earlier turns: many leave out the reasoning
of all replies but the last. As long as the template prints what was read and sampled, the tokens stay those that were
sampled, the turns extend each other and are trained as one sample; else the history is encoded as it is printed now,
and the next turn opens a new sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyrl_gym.core import EnvFailure
from skyrl_train.rollout.template_check import TemplateRefused
from skyrl_train.types import Message

if TYPE_CHECKING:
    from skyrl_train.engine.base import Completion
    from skyrl_train.rollout.chat import ChatTemplate


@dataclass
class StepWiseChat:
    """One conversation as messages and as tokens. `ids` is what the engine is given next, `printed` their text."""

    template: ChatTemplate
    messages: list[Message]
    printed: str
    ids: list[int]

    @classmethod
    def of(cls, template: ChatTemplate, messages: Sequence[Message], ids: list[int] | None = None) -> StepWiseChat:
        """Return a conversation that waits for a reply. ids: its tokens, where they are known already."""
        printed = template.render(messages, add_generation_prompt=True)
        return cls(template, list(messages), printed, template.encode_text.again(printed) if ids is None else ids)

    def kept(self, completion: Completion) -> tuple[list[int], list[float]]:
        """Return the sampled tokens and their logprobs: all are trained."""
        return completion.response_ids, completion.logprobs

    def append(self, reply_ids: list[int], observation: Sequence[Message]) -> None:
        """Append a reply and the environment's answer. Raises EnvFailure if the template does not print the answer."""
        is_closed = bool(reply_ids) and reply_ids[-1] in self.template.end_ids
        text = self._text_of(reply_ids[:-1] if is_closed else reply_ids)
        read = self.printed + text
        self._print(text, observation)
        behind = self.template.encode_text(self.printed[len(read) :]) if self.printed.startswith(read) else []
        if is_closed and behind[:1] == reply_ids[-1:]:
            self.ids = [*self.ids, *reply_ids, *behind[1:]]
        elif behind and not is_closed:  # the template's end of turn is given, not sampled
            self.ids = [*self.ids, *reply_ids, *behind]
        else:
            self.ids = self.template.encode_text(self.printed)

    def append_edited(self, text: str, observation: Sequence[Message]) -> None:
        """Append `text`, with which the environment replaced the reply, and the environment's answer."""
        self._print(text, observation)
        self.ids = self.template.encode_text(self.printed)

    def _print(self, text: str, observation: Sequence[Message]) -> None:
        self.messages = [*self.messages, {"role": "assistant", "content": text}, *observation]
        try:
            self.template.check_roles(tuple(message["role"] for message in observation))
            self.printed = self.template.render(self.messages, add_generation_prompt=True)
        except TemplateRefused as error:
            raise EnvFailure(str(error)) from error

    def _text_of(self, reply_ids: list[int]) -> str:
        """Return a reply's text, special tokens included; decoded alone, it could lose its first space."""
        last = self.ids[-1:]
        return self._decoded([*last, *reply_ids])[len(self._decoded(last)) :]

    def _decoded(self, ids: list[int]) -> str:
        return self.template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
