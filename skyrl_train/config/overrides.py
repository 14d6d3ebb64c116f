"""Build the tree that overrides (`trainer.epochs=2`) describe, or say what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from skyrl_train.config.build import build
from skyrl_train.config.corrected import advice_to_paste
from skyrl_train.config.grammar import parsed_overrides
from skyrl_train.config.problems import ConfigError
from skyrl_train.config.refused import lies_in
from skyrl_train.config.section import Section

Root = TypeVar("Root", bound=Section)


def tree_of(overrides: Sequence[str], root: type[Root]) -> Root:
    """Return the checked tree, or raise a ConfigError with every problem that ends with the corrected command."""
    try:
        return with_overrides(overrides, root)
    except ConfigError as error:
        raise ConfigError(error.problems, paste(overrides, root)) from None


def paste(overrides: Sequence[str], root: type[Section]) -> str:
    """Return the end of a refusal: the command that would start, or nothing if none is known."""
    return advice_to_paste(overrides, lambda texts: with_overrides(texts, root))


def with_overrides(overrides: Sequence[str], root: type[Root]) -> Root:
    """Return the checked tree, or raise a ConfigError with every problem."""
    settings, problems = parsed_overrides(overrides)
    added = {text.lstrip("+").partition("=")[0] for text in overrides if text.startswith("+")}
    return build(root, settings, problems, may_add=lambda key: any(lies_in(key, own) for own in added))
