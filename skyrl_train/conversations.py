"""Conversations to imitate: rows of files become samples whose trained tokens are what the assistant says in them.

The tokens are made by the code that grows the conversations of episodes (rollout/chat.py). So a row is trained exactly
as an episode that said the same would be: prompt and observations are read, and what is said is trained, with the end
of turn that the engine stops at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from loguru import logger

from skyrl_gym.core import EnvFailure
from skyrl_train.batch.packing import pack
from skyrl_train.prompts import DataError, Row, checked_conversation, epoch_order, read_source
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.types import Batch, Message, Sample

_NOTHING = (None, "", "[]", "null", [], {})
FORMS = '"messages" that end with the assistant\'s, or "prompt" and "response"'


@dataclass(frozen=True)
class Conversations:
    """The samples of all conversations and their order. Steps count from 1; each is one optimizer step."""

    samples: Sequence[Sample]
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def batch(self, step: int) -> Batch:
        """Return the conversations of one step; the last of an epoch may have fewer."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = epoch_order(len(self.samples), self.seed, epoch)
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        return pack([self.samples[row] for row in rows])


def read_conversations(sources: Sequence[str], template: ChatTemplate, max_length: int) -> list[Sample]:
    """Return a sample for each row that has at most `max_length` tokens. DataError names a row that is none."""
    rows = [(place, row) for source in sources for place, row in read_source(source)]
    found = [sample_of(row_conversation(place, row), template, place) for place, row in rows]
    samples = [sample for sample in found if len(sample.input_ids) <= max_length]
    names, num_dropped = ", ".join(sources), len(found) - len(samples)
    if not samples:
        shortest = (
            f": the shortest has {min(len(s.input_ids) for s in found)} tokens, {max_length} fit" if found else ""
        )
        raise DataError(f"no conversation in {names} (trainer.sft.data) can be trained{shortest}")
    dropped = f", {num_dropped} dropped (longer than {max_length} tokens)" if num_dropped else ""
    num_tokens = sum(sum(sample.loss_mask) for sample in samples)
    logger.log(
        "WARNING" if dropped else "INFO",
        f"{len(samples)} conversations to imitate from {names}, {num_tokens:,} trained tokens{dropped}",
    )
    return samples


def row_conversation(place: str, row: Row) -> list[Message]:
    """Return the checked messages of a row, an assistant's last."""
    row = {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else row
    if isinstance(row, dict) and "messages" in row:
        messages = checked_conversation(place, "messages", row["messages"])
    elif isinstance(row, dict) and {"prompt", "response"} <= row.keys():
        prompt, response = row["prompt"], row["response"]
        if not isinstance(response, str):
            raise DataError(f"{place}: response must be a text, got {str(response)[:80]!r}")
        opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        opening = checked_conversation(place, "prompt", opening)
        messages = [*opening, *checked_conversation(place, "response", [{"role": "assistant", "content": response}])]
    else:
        found = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{place} (trainer.sft.data) has no {FORMS}; it has {found}")
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or roles[0] == "assistant":
        raise DataError(
            f"{place}: messages must begin with a prompt and end with the assistant's, got {', '.join(roles)}"
        )
    _refuse_what_is_not_printed(place, row, messages)
    if ("assistant", "assistant") in pairwise(roles):
        raise DataError(f"{place}: two messages of the assistant follow each other; join them, got {', '.join(roles)}")
    return messages


def _refuse_what_is_not_printed(place: str, row: Row, messages: Sequence[Message]) -> None:
    """Raise DataError for what belongs to a reply and is no part of its text: it would be left out without a word."""
    for message in messages:
        others = [key for key in message if key not in ("role", "content") and message[key] not in _NOTHING]
        if message["role"] == "assistant" and others:
            raise DataError(
                f"{place}: a message of the assistant has {', '.join(others)}, and only its content is imitated: write "
                "into it what the model is to say, calls of tools and reasoning in the form of the model's own template"
            )
    if offered := [name for name in ("tools", "functions") if row.get(name) not in _NOTHING]:
        raise DataError(
            f"{place}: {offered[0]} would not be shown to the model: write them into a system message, in the form of "
            "the model's own template, and leave out the column"
        )


def sample_of(messages: Sequence[Message], template: ChatTemplate, place: str) -> Sample:
    """Return the conversation as a sample: what its assistant says is trained, with the end of each turn."""
    try:
        parts = list(_parts(messages, template, place))
    except EnvFailure as error:
        raise DataError(f"{place}: {error}") from error
    ids = [token for part, _ in parts for token in part]
    return Sample(
        input_ids=ids,
        loss_mask=[is_said for part, is_said in parts for _ in part],
        rollout_logprobs=[0.0] * len(ids),
        rewards=[0.0] * len(ids),
        num_prompt_tokens=len(parts[0][0]),
        group_id=place,
        trajectory_id=place,
    )


def _parts(messages: Sequence[Message], template: ChatTemplate, place: str) -> Iterator[tuple[list[int], bool]]:
    """Yield (tokens, whether the assistant says them), in turns: what is read, what is said, what is read, ..."""
    turns = [list(turn) for _, turn in groupby(messages, key=lambda message: message["role"] == "assistant")]
    chat = template.start(turns[0])
    yield chat.ids, False
    for i in range(1, len(turns), 2):
        observation = turns[i + 1] if i + 1 < len(turns) else None
        reply = template.said(turns[i][0]["content"], observation)
        yield reply, True
        if observation is not None:
            before = [*chat.ids, *reply]
            chat.append(reply, observation)
            if chat.ids[: len(before)] != before:  # only with generator.step_wise_trajectories
                raise DataError(
                    f"{place}: the chat template edits earlier turns once the conversation goes on; give each reply "
                    "that is to be imitated as a conversation of its own"
                )
            yield chat.ids[len(before) :], False
