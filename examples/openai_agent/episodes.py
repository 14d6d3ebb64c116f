"""The trainer's side: the tasks, and a function that hands an episode to the agent and pays for what came of it."""

from __future__ import annotations

import json
import os
from difflib import SequenceMatcher
from random import Random
from typing import Any
from urllib.request import urlopen

WORDS = ("bread", "chair", "cloud", "horse", "lamp", "moon", "river", "stone", "table", "tiger", "water", "window")
INSTRUCTION = "The environment echoes what you write between <action> and </action>. Make it echo these words exactly."
SHOWN = "red lamp tree"


def play(prompt: list[dict[str, Any]], extras: dict[str, Any], base_url: str, api_key: str) -> float:
    """Return how much of what was wanted the environment said; 1.0 only if it said exactly that."""
    task = json.dumps({"messages": prompt, "base_url": base_url, "api_key": api_key})
    with urlopen(f"{os.environ['AGENT_URL']}/play", task.encode(), timeout=600) as answer:
        said = json.load(answer)["said"]
    return SequenceMatcher(None, extras["words"], said[:200], autojunk=False).ratio()


def rows(num: int, *, seed: int) -> list[dict[str, Any]]:
    draw = Random(seed)
    wanted = [" ".join(draw.sample(WORDS, 3)) for _ in range(num)]
    return [{"prompt": opening(words), "words": words, "data_source": "echo_agent"} for words in wanted]


def opening(words: str) -> list[dict[str, str]]:
    """Return an example as earlier turns, then the task."""
    return [
        {"role": "user", "content": f"{INSTRUCTION}\n\n{SHOWN}"},
        {"role": "assistant", "content": f"<action>{SHOWN}</action>"},
        {"role": "user", "content": f"Now these words.\n\n{words}"},
    ]
