"""TRL: whole training steps, generation and rewards included."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from tests.benchmarks.workers.environments import share_of_vowels
from tests.benchmarks.workers.prompts import conversations
from tests.benchmarks.workers.trl import InTurns, TimedGeneration, make_trainer
from tests.benchmarks.workers.turns import NoMoreTurns, settings


def rewards(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return [share_of_vowels(message["content"]) for [message] in completions]


def main() -> None:
    asked = settings()
    tokenizer: Any = AutoTokenizer.from_pretrained(asked["model"])
    rows = [{"prompt": messages} for messages in conversations(tokenizer, asked["num_prompts"], asked["prompt_tokens"])]
    trainer = make_trainer(asked, rows, rewards, TimedGeneration)
    trainer.add_callback(InTurns(lambda logs: {"generate": trainer.generate_s}))
    try:
        trainer.train()
    except NoMoreTurns:
        return


if __name__ == "__main__":
    main()
