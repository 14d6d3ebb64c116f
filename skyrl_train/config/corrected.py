"""Find the command that would be accepted: drop or replace what is refused until the configuration is valid."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from skyrl_train.config.grammar import parsed_overrides
from skyrl_train.config.problems import ConfigError, Problem, written
from skyrl_train.config.refused import lies_in
from skyrl_train.config.renamed import renamed
from skyrl_train.console import as_typed, shell_line

MAX_ROUNDS = 8  # a correction may bring up a rule that could not be asked before


def corrected(overrides: Sequence[str], check: Callable[[Sequence[str]], object]) -> list[str] | None:
    """Return overrides that `check` accepts: those given, without what it refuses or with another value for it.

    None if there are none to be found. `check` raises ConfigError.
    """
    current = list(overrides)
    for _ in range(MAX_ROUNDS):
        try:
            check(current)
        except ConfigError as error:
            changed = current
            for problem in error.problems:
                changed = without(problem, changed)
            if changed == current:
                return None
            current = changed
        else:
            return current
    return None


def without(problem: Problem, overrides: list[str]) -> list[str]:
    """Return the overrides without those that cause the problem, and with the settings that it names instead."""
    kept = overrides
    for key in (problem.key,) if problem.drops is None else problem.drops:
        kept = _without_key(key, kept)
    return kept + [setting for setting in problem.fix if setting not in kept]


def _without_key(key: str, overrides: list[str]) -> list[str]:
    """Return the overrides that do not set this key: whole, below it, or as an item of a mapping for its section."""
    wanted = renamed(key)
    keys = {text: renamed(text.lstrip("+~").partition("=")[0]) for text in overrides}
    exact = [text for text in overrides if text == key or keys[text] == wanted]
    if exact:
        return [text for text in overrides if text not in exact]
    kept: list[str] = []
    for text in overrides:
        if lies_in(wanted, keys[text]):
            kept += _without_key(key, _items(text, keys[text]))
        elif not lies_in(keys[text], wanted):
            kept.append(text)
    return kept


def _items(override: str, key: str) -> list[str]:
    """Return `a={b:1,c:2}` as [a.b=1, a.c=2]; nothing for a value that is no mapping."""
    [value] = [value for _, value in parsed_overrides([override])[0]] or [None]
    plus = "+" if override.startswith("+") else ""
    return [written(f"{plus}{key}.{name}", item) for name, item in value.items()] if isinstance(value, Mapping) else []


def as_command(overrides: Sequence[str], instead_of: Sequence[str]) -> str:
    """Return the command line of this process with other overrides, or the overrides alone if they were not on it.

    The overrides at the end of the command line may come behind others, of a recipe, which its first words stand for.
    """
    typed = sys.argv[1:]
    num_typed = 0
    while num_typed < min(len(typed), len(instead_of)) and typed[-1 - num_typed] == instead_of[-1 - num_typed]:
        num_typed += 1
    num_before = len(instead_of) - num_typed
    is_kept = list(overrides[:num_before]) == list(instead_of[:num_before])
    if num_typed and is_kept and sys.orig_argv[-num_typed:] == typed[-num_typed:]:
        return shell_line([*_program(sys.orig_argv[:-num_typed]), *overrides[num_before:]])
    return shell_line(overrides)


def _program(words: list[str]) -> list[str]:
    """Return the first words of a command line as they are typed: the script `skyrl` is called by its name."""
    if len(words) < 2 or os.path.basename(words[1]) != "skyrl":
        return words
    script = words[1]
    return [*(as_typed("skyrl").split() if shutil.which("skyrl") == script else [script]), *words[2:]]


def advice_to_paste(
    overrides: Sequence[str], check: Callable[[Sequence[str]], object], begin: Sequence[str] | None = None
) -> str:
    """Return the end of a refusal: the corrected command, or nothing where no correction is known.

    begin: overrides with which a problem is solved that `check` does not find.
    """
    found = corrected(overrides if begin is None else begin, check)
    command = as_command(found, overrides) if found is not None else ""
    return f"\nThis would start:\n  {command}" if command else ""
