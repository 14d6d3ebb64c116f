"""A reply in pieces, as it is sampled. Its tokens are those of a whole request: a draw follows seed and position."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from skyrl_train.engine.base import Engine, Request, SamplingParams
from skyrl_train.rollout.chat import ChatTemplate

PIECE = 4  # tokens that are sampled before they are shown
HALF_LETTER = "\ufffd"  # what the bytes of an unfinished character are decoded to


@dataclass(frozen=True, slots=True)
class Piece:
    """The next letters of a reply, and all its tokens so far. is_last: nothing follows."""

    text: str
    ids: list[int]
    is_last: bool


async def streamed(
    engine: Engine, template: ChatTemplate, prompt_ids: list[int], sampling: SamplingParams, session_id: str
) -> AsyncGenerator[Piece]:
    """Yield a reply piece by piece. ValueError if the prompt leaves no room for one."""
    ids: list[int] = []
    shown = ""
    while True:
        left = min(sampling.max_tokens, engine.max_model_len - len(prompt_ids)) - len(ids)
        wanted = min(PIECE, left)
        short = replace(sampling, max_tokens=max(wanted, 1), min_tokens=min(max(sampling.min_tokens - len(ids), 0), 1))
        done = await engine.generate(Request([*prompt_ids, *ids], short, session_id))
        ids += done.response_ids
        text = str(template.tokenizer.decode(ids, skip_special_tokens=True))
        is_last = done.stop_reason != "length" or left <= wanted or any(stop in text for stop in sampling.stop)
        if is_last or not text.endswith(HALF_LETTER):
            yield Piece(text[len(shown) :], list(ids), is_last)
            shown = text
        if is_last:
            return
