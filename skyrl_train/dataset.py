"""SkyRL's import path `skyrl_train.dataset`: its data set as a user's `get_train_dataset` builds and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skyrl_train import prompts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptDataset"]

Item = tuple[Any, str | None, dict[str, Any], str]


class PromptDataset:
    """The rows whose prompt has at most `max_prompt_length` tokens, as (messages, env_class or None, extras, uid)."""

    def __init__(
        self,
        datasets: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        num_workers: int = 8,
        prompt_key: str = "prompt",
        env_class_key: str = "env_class",
    ) -> None:
        sources = [datasets] if isinstance(datasets, str) else list(datasets)
        kept = prompts.PromptRows(sources, tokenizer, max_prompt_length, "", prompt_column=prompt_key)
        self._items: list[Item] = []
        for prompt in kept:
            extras = {name: value for name, value in prompt.env_extras.items() if name != prompt_key}
            env_class = prompt.env_class if env_class_key == "env_class" else extras.pop(env_class_key, None)
            self._items.append((prompt.messages, env_class or None, extras, prompt.uid))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]

    @property
    def dataframe(self) -> Dataset:
        """Return the rows as a data set of Hugging Face."""
        from datasets import Dataset

        return Dataset.from_list([{"prompt": p, "env_class": e, **extras} for p, e, extras, _ in self._items])

    def collate_fn(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the items as SkyRL's trainer takes them."""
        return [{"prompt": p, "env_class": e, "env_extras": extras, "uid": uid} for p, e, extras, uid in items]
