"""A reply on its way: pieces as they are sampled, and the part of their text that may be shown by now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from skyrl_train.engine.base import Completion, OnProgress

HALF_LETTER = "\ufffd"  # what the bytes of an unfinished character are decoded to


class ReplyChanged(RuntimeError):
    """The whole reply does not begin with what was shown of it: another engine computed it again."""


@dataclass(frozen=True, slots=True)
class Partial:
    """All that is sampled of a reply so far."""

    response_ids: list[int]
    logprobs: list[float]


async def in_pieces(
    sample: Callable[[OnProgress], Coroutine[Any, Any, Completion]],
) -> AsyncGenerator[Partial | Completion]:
    """Yield a Partial whenever there is news, and the Completion in the end.

    Who closes or cancels this cancels `sample`. A Partial that nobody has taken gives way to a newer one.
    """
    latest: list[Partial] = []
    news = asyncio.Event()

    def on_progress(ids: list[int], logprobs: list[float]) -> None:
        latest[:] = [Partial(ids, logprobs)]
        news.set()

    sampling = asyncio.create_task(sample(on_progress))
    sampling.add_done_callback(lambda _: news.set())
    try:
        while not sampling.done():
            await news.wait()
            news.clear()
            if latest and not sampling.done():
                yield latest.pop()
        yield sampling.result()
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)


class ShownText:
    """The text of a growing reply that may be shown: no half letters, no stop string, nor what may become one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._shown = ""

    def news(self, ids: list[int]) -> str:
        """Return what may be shown now and could not before. ids: all that are sampled so far."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True)).rstrip(HALF_LETTER)
        return self._beyond(text[: len(text) - _num_held(text, self._stops)])

    def rest(self, text: str) -> str:
        """Return what follows when the reply is whole. ReplyChanged if it does not begin with what was shown."""
        if not cut_at_stop(text, self._stops).startswith(self._shown):
            raise ReplyChanged("an engine was replaced, and the reply goes on otherwise than it began; ask again")
        return self._beyond(text)

    def _beyond(self, text: str) -> str:
        text = cut_at_stop(text, self._stops)
        if not text.startswith(self._shown):
            return ""
        news, self._shown = text[len(self._shown) :], text
        return news


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string in it; all of it if there is none."""
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _num_held(text: str, stops: Sequence[str]) -> int:
    """Return how many letters at the end of the text may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
