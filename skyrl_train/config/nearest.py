"""Find the key that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_train.config.problems import NO_VALUE, Problem, shown, written
from skyrl_train.config.synonyms import SYNONYMS, keeps_value, squeezed

OTHER_MODELS = ("trainer.ref.", "trainer.critic.")  # `model.path` is the policy's


def unknown_key(key: str, value: Any, known: Sequence[str]) -> Problem:
    """Return the problem of an unknown key; it names the known key that was probably meant."""
    near = nearest_keys(key, known)
    if near:
        can_be_pasted = keeps_value(key) and not isinstance(value, Mapping)
        fix = (written(near[0], value),) if can_be_pasted else ()
        return Problem(key, NO_VALUE, f"is not a key of the configuration; did you mean {' or '.join(near)}?", fix)
    setting = "" if isinstance(value, Mapping) else f"={shown(value)}"
    fix = () if _is_beside(key, known) or isinstance(value, Mapping) else (f"+{written(key, value)}",)
    return Problem(
        key,
        NO_VALUE,
        f"is not a key of the configuration; a key of your own is written +{key}{setting}, and "
        "`python -m skyrl_train.config` lists every key",
        fix,
    )


def _is_beside(key: str, known: Sequence[str]) -> bool:
    """Return whether keys of ours stand in the section of this one; else the section is of the user's own."""
    section = key.rpartition(".")[0]
    return not section or any(other.startswith(f"{section}.") for other in known)


def nearest_keys(key: str, known: Sequence[str], likeness: float = 0.7) -> list[str]:
    """Return up to two known keys: by the last name in a common section, by synonym, or by similar spelling.

    generator.temperature -> generator.sampling_params.temperature, generator.eval_sampling_params.temperature
    learning_rate -> trainer.policy.optimizer_config.lr

    likeness: of the spelling of two last names, from 0 to 1.

    The warm start has keys with the names of the training's own; they are meant only where it is named.
    """
    if "sft" not in key:
        known = [other for other in known if not other.startswith("trainer.sft.")]
    last = key.rpartition(".")[2]
    same_name = [other for other in known if other.rpartition(".")[2] == last]
    same_name.sort(
        key=lambda other: (
            -int(shared_sections(key, other)),
            other.startswith(OTHER_MODELS),
            -shared_sections(key, other),
        )
    )
    synonym = SYNONYMS.get(squeezed(last), "")
    if synonym in known and not (same_name and shared_sections(key, same_name[0]) >= 1):
        return [synonym]
    if same_name:
        return same_name[:2]
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if not alike and "." in key and not _is_beside(key, known):
        return []  # a name in a section of the user's own is no slip of ours
    names = {other.rpartition(".")[2]: other for other in sorted(known, key=lambda other: shared_sections(key, other))}
    alike += [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=likeness)]
    return list(dict.fromkeys(alike))[:2]


def shared_sections(key: str, other: str) -> float:
    """Return the number of sections that two keys share, plus the similarity of their spelling (0 to 1)."""
    mine, theirs = set(key.split(".")[:-1]), set(other.split(".")[:-1])
    return len(mine & theirs) + difflib.SequenceMatcher(None, key, other).ratio()
