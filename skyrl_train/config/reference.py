"""The table of all keys: default and meaning, read from the dataclasses and the comments beside their fields."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from skyrl_train.config.problems import shown
from skyrl_train.config.refused import reason_against
from skyrl_train.config.refused_rows import ROWS
from skyrl_train.config.section import is_section
from skyrl_train.config.synonyms import names_elsewhere

# The keys that most runs set, in the order in which a run is planned.
MOST_USED = (
    "trainer.policy.model.path",
    "data.train_data",
    "data.val_data",
    "environment.env_class",
    "trainer.epochs",
    "trainer.train_batch_size",
    "trainer.policy_mini_batch_size",
    "generator.n_samples_per_prompt",
    "trainer.policy.optimizer_config.lr",
    "trainer.policy.model.lora.rank",
    "generator.sampling_params.max_generate_length",
    "generator.sampling_params.temperature",
    "generator.max_turns",
    "trainer.max_prompt_length",
    "generator.max_input_length",
    "trainer.algorithm.advantage_estimator",
    "trainer.algorithm.policy_loss_type",
    "trainer.algorithm.use_kl_loss",
    "trainer.algorithm.kl_loss_coef",
    "trainer.device",
    "trainer.seed",
    "trainer.eval_interval",
    "trainer.ckpt_path",
    "trainer.ckpt_interval",
    "trainer.resume_mode",
    "trainer.logger",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table."""

    key: str
    default: str
    meaning: str
    refusal: str | None = None  # why the key may only keep its default

    def matches(self, words: str) -> bool:
        """Return whether the words are words of the key and its meaning, or of a name that other trainers give it."""
        texts = (f"{self.key} {self.meaning}", *names_elsewhere(self.key))
        return any(words_of(words) <= words_of(text) for text in texts)


def words_of(text: str) -> set[str]:
    """Return the words of a text or key in lower case and singular: "Steps of a batch" -> {step, of, a, batch}."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words}


def entries(root: type) -> list[Setting]:
    """Return one entry per key that does something: the most used first, the others in the order of the tree."""
    found = {entry.key: entry for entry in section_entries(root(), "")}
    return [found.pop(key) for key in MOST_USED if key in found] + list(found.values())


def refused_entries() -> list[Setting]:
    """Return one entry per key that may only keep its default."""
    return [Setting(key, shown(row.default), row.meaning, reason_against(key)) for key, row in ROWS.items()]


def section_entries(section: Any, prefix: str) -> Iterator[Setting]:
    for name, value in vars(section).items():
        key = f"{prefix}{name}"
        if is_section(value):
            yield from section_entries(value, f"{key}.")
        else:
            yield Setting(key, shown(value), meaning_of(type(section), name))


def meaning_of(section: type, name: str) -> str:
    """Return the comment beside the field or above it, else that of the parent class."""
    for cls in section.__mro__:
        if name in vars(cls).get("__annotations__", {}):
            comment = comments(cls).get(name, "")
            if comment:
                return comment
    return ""


@cache
def comments(cls: type) -> dict[str, str]:
    source = inspect.getsource(cls)
    lines = source.splitlines()
    [body] = ast.parse(source).body
    found = {}
    for node in ast.walk(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :].partition("#")[2]
            above = lines[node.lineno - 2].strip()
            found[node.target.id] = (beside or above.removeprefix("#") if above.startswith("#") else beside).strip()
    return found
