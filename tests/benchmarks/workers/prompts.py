"""Chat prompts of a given length in tokens."""

from __future__ import annotations

from typing import Any

WORDS = "the sea and a mountain met one day to talk of rain and wind while birds went over them in the evening light"


def prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Return different prompts of `num_tokens` tokens each, generation prompt included."""
    return [_ids(tokenizer, message["content"]) for [message] in conversations(tokenizer, num_prompts, num_tokens)]


def conversations(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[dict[str, str]]]:
    """Return the same prompts as conversations of one user message."""
    return [[{"role": "user", "content": _text(tokenizer, index, num_tokens)}] for index in range(num_prompts)]


def _text(tokenizer: Any, index: int, num_tokens: int) -> str:
    """Return a text of exactly this length: words, and a filler at the end."""
    words, text, place = WORDS.split(), f"Story {index}:", index
    while (size := len(_ids(tokenizer, text))) < num_tokens:
        longer = [text + piece for piece in (f" {words[place % len(words)]}", " a", "?")]
        fitting = [words for words in longer if size < len(_ids(tokenizer, words)) <= num_tokens]
        if not fitting:
            break
        text, place = fitting[0], place + 1
    if size != num_tokens:
        raise ValueError(f"cannot make a prompt of {num_tokens} tokens: {text!r} has {size}")
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
