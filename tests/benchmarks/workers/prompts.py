"""Chat prompts of a given length in tokens."""

from __future__ import annotations

from typing import Any

WORDS = "the sea and a mountain met one day to talk of rain and wind while birds went over them in the evening light"


def prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Different prompts of `num_tokens` tokens each, generation prompt included."""
    return [_ids(tokenizer, message["content"]) for [message] in conversations(tokenizer, num_prompts, num_tokens)]


def conversations(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[dict[str, str]]]:
    """The same as messages: one of the user each."""
    return [[{"role": "user", "content": _text(tokenizer, index, num_tokens)}] for index in range(num_prompts)]


def _text(tokenizer: Any, index: int, num_tokens: int) -> str:
    words = WORDS.split()
    text = f"Story {index}:"
    for place in range(num_tokens):
        size = len(_ids(tokenizer, text))
        if size >= num_tokens:
            break
        text += " a" if num_tokens - size < 3 else f" {words[(place + index) % len(words)]}"
    if len(_ids(tokenizer, text)) != num_tokens:
        raise ValueError(f"no prompt of {num_tokens} tokens can be made: {text!r} has {len(_ids(tokenizer, text))}")
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
