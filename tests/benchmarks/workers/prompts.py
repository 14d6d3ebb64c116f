"""Chat prompts of a given length in tokens."""

from __future__ import annotations

from typing import Any

WORDS = "the sea and a mountain met one day to talk of rain and wind while birds went over them in the evening light"


def prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Different prompts of `num_tokens` tokens each, generation prompt included."""
    return [_prompt(tokenizer, index, num_tokens) for index in range(num_prompts)]


def _prompt(tokenizer: Any, index: int, num_tokens: int) -> list[int]:
    words = WORDS.split()
    text = f"Story {index}:"
    while True:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if len(ids) >= num_tokens:
            return ids[: num_tokens - 5] + ids[-5:]
        text += " " + words[(len(text) + index) % len(words)]
