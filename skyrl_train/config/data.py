"""The data sets of prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section


@dataclass
class DataConfig(Section, at="data"):
    """The data sets: .parquet, .json or .jsonl files, or names on the hub as name[:split]."""

    # Sources of training prompts, one after the other. "~" is the home folder.
    train_data: list[str] = field(default_factory=lambda: ["~/data/gsm8k/train.parquet"])
    # Sources of evaluation prompts; [] means no evaluation.
    val_data: list[str] = field(default_factory=lambda: ["~/data/gsm8k/validation.parquet"])
    prompt_column: str = "prompt"  # a list of {role, content}, or a text, which becomes one message of the user

    def settle(self) -> None:
        self.train_data = [os.path.expanduser(source) for source in self.train_data]
        self.val_data = [os.path.expanduser(source) for source in self.val_data]

    def rules(self) -> Iterator[Problem]:
        if not self.prompt_column:
            yield self.problem("prompt_column", "is empty; name the column that holds the prompt")
        for key in ("train_data", "val_data"):
            for source in getattr(self, key):
                if "://" in source:
                    yield self.problem(key, f"names the remote store {source!r}; copy the file here and give its path")
