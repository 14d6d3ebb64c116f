"""A data set of the user's own class: its items, in any form that SkyRL knows, become prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loguru import logger

from skyrl_train.prompts import DataError, PromptRows, row_prompt
from skyrl_train.types import Prompt

COLLATED = {"prompt", "env_class", "env_extras", "uid"}  # what SkyRL's collate_fn makes of an item


@dataclass(frozen=True, slots=True)
class GivenPrompt(Prompt):
    """A prompt of which the user's generator gets what the data set gave, which may be no conversation: a path."""

    given: Any = None


class GivenPrompts(PromptRows):
    """The items of `dataset` (with __len__ and __getitem__, or iterable), in order; no prompt is too long for it."""

    def __init__(self, dataset: Any, method: str, default_env_class: str) -> None:
        items = [dataset[i] for i in range(len(dataset))] if hasattr(dataset, "__getitem__") else list(dataset)
        if not items:
            raise DataError(f"{method} returned a {type(dataset).__name__} without any items")
        prompts = [
            _prompt(f"item {i} of {method}", _collated(dataset, item), default_env_class)
            for i, item in enumerate(items)
        ]
        self._prompts = [replace(prompt, uid=prompt.uid or str(i)) for i, prompt in enumerate(prompts)]
        doubled = len(prompts) - len({prompt.uid for prompt in self._prompts})
        if doubled:
            raise DataError(f"{method}: {doubled} items have the uid of another one; a uid names one prompt")
        self.num_dropped = 0
        logger.info(f"{len(self._prompts)} prompts from {type(dataset).__name__}")


def given_prompts(dataset: Any, method: str, default_env_class: str) -> PromptRows | None:
    """Return what a method of the experiment returned as a data set. DataError for what is none."""
    if dataset is None or isinstance(dataset, PromptRows):
        return dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) and not hasattr(dataset, "__iter__"):
        raise DataError(
            f"{method} returned {type(dataset).__name__}; it must return a PromptDataset (skyrl_train.dataset), or a "
            "data set with __len__ and __getitem__"
        )
    return GivenPrompts(dataset, method, default_env_class)


def _collated(dataset: Any, item: Any) -> Any:
    """Return the item as the data set's own collate_fn makes a batch of it, unless that does not know our forms."""
    collate = getattr(dataset, "collate_fn", None)
    if callable(collate) and not isinstance(item, Prompt):
        batch = collate([item])
        if isinstance(batch, list) and len(batch) == 1:
            return batch[0]
    return item


def _prompt(place: str, item: Any, default_env_class: str) -> Prompt:
    """Return an item as a prompt: ours, SkyRL's tuple (prompt, env_class, extras, uid), its dictionary, or a row."""
    if isinstance(item, Prompt):
        return item
    if isinstance(item, tuple) and len(item) == 4:
        item = dict(zip(("prompt", "env_class", "env_extras", "uid"), item, strict=True))
    if not isinstance(item, Mapping):
        raise DataError(
            f"{place} is a {type(item).__name__}; it must be a dictionary with prompt, env_class, env_extras and uid, "
            "or a tuple of these four"
        )
    if set(item) <= COLLATED:
        extras = dict(item.get("env_extras") or {})
        row = {**extras, "prompt": item.get("prompt"), "env_class": item.get("env_class")}
    else:
        row = dict(item)
    made = row_prompt(place, row, default_env_class)
    uid = item.get("uid")
    return GivenPrompt(
        uid="" if uid is None else str(uid),
        messages=made.messages,
        env_class=made.env_class,
        env_extras=made.env_extras,
        given=item.get("prompt"),
    )
