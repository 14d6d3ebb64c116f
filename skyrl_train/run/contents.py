"""The inputs of a run by content: digests of its rows, models and chat template, kept in its checkpoints.

Other rows or another model under the same path make another run; the same ones under another path do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from json import dumps
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from skyrl_train.run.digests import file_digest, text_digest
from skyrl_train.types import Prompt, Sample

Contents = dict[str, dict[str, str]]  # setting that names the content -> part -> digest or number
MODEL_FILES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py", ".gguf", ".tiktoken"}
NOT_READ = ("license", "notice", "readme", ".")  # beginnings of the names of files that no run reads
MAX_SHOWN = 5


def model_contents(folder: Path | str) -> dict[str, str]:
    """Return the digest of every file of a model's folder that may hold weights, tokenizer or settings."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in MODEL_FILES and path.is_file())
    return {path.name: file_digest(path) for path in files if not path.name.lower().startswith(NOT_READ)}


def prompt_contents(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Return number and digest of the rows that are played, in their order, whatever file they came from."""
    digest, count = xxh3_128(), 0
    for prompt in prompts:
        row = dumps([prompt.messages, prompt.env_class, prompt.env_extras], default=_plain)
        digest.update(f"{row}\n".encode())
        count += 1
    return {"rows": str(count), "their digest": digest.hexdigest()}


def sample_contents(samples: Iterable[Sample]) -> dict[str, str]:
    """Return number and digest of conversations as tokens, in their order."""
    digest, count = xxh3_128(), 0
    for sample in samples:
        digest.update(f"{dumps([sample.input_ids, sample.loss_mask])}\n".encode())
        count += 1
    return {"rows": str(count), "their digest": digest.hexdigest()}


def template_contents(template: object) -> dict[str, str]:
    """Return the digest of the chat template: the Jinja text, or a dictionary of several."""
    return {"template": text_digest(dumps(template))}


def changed_contents(old: Contents, new: Contents) -> dict[str, str]:
    """Return the changes in words, for every setting that both have."""
    changes = {}
    for key in sorted(old.keys() & new.keys()):
        parts = [part for part in sorted(old[key].keys() | new[key].keys()) if old[key].get(part) != new[key].get(part)]
        if parts:
            shown = "; ".join(_change(part, old[key].get(part), new[key].get(part)) for part in parts[:MAX_SHOWN])
            changes[key] = shown + (f"; and {len(parts) - MAX_SHOWN} more" if len(parts) > MAX_SHOWN else "")
    return changes


def _plain(value: Any) -> Any:
    """Return a replacement for a value that JSON cannot hold, the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if hasattr(value, "tolist"):
        return value.tolist()
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)


def _change(part: str, old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{part} is {'new' if old is None else 'missing'}"
    if part == "rows":
        return f"{old} rows then, {new} now"
    return f"{part} differs (was {old[:12]}, is now {new[:12]})"
