"""A tokenizer as the metadata of a GGUF file: byte-level BPE with a pre-tokenizer that llama.cpp knows by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from skyrl_train.policy.refusal import ModelRefused

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

# llama.cpp's names of pre-tokenizers that are one regular expression; with llama-bpe a whole word that is a token stays
# one, whatever the merges say.
BY_EXPRESSION = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")}
IGNORES_MERGES = ("llama-bpe", "tekken")
# Settings of BPE that change which tokens a word becomes, and of which llama.cpp knows nothing.
_CHANGES_OF_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words. ModelRefused if it has none for it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model") or {}
    steps = _steps(state.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not steps or steps[-1]["type"] != "ByteLevel" or not model["merges"]:
        raise ModelRefused(
            "GGUF is written for byte-level BPE tokenizers with merges, and this model's is another kind"
        )
    if changes := [key for key in _CHANGES_OF_BPE if model.get(key)]:
        raise ModelRefused(f"GGUF has no key for this tokenizer's {', '.join(changes)}")
    name = _name_of(steps)
    is_as_there = bool(model.get("ignore_merges")) == (name in IGNORES_MERGES)
    normalizers = {step["type"] for step in _steps(state.get("normalizer"))}
    if name is None or not is_as_there or normalizers - {"NFC"}:
        raise ModelRefused(
            f"GGUF names how a tokenizer cuts text, and llama.cpp has no name for this one: {_shown(steps)}"
        )
    return name


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path, num_rows: int) -> None:
    """Add tokens, merges, special tokens and the chat template. folder: where the tokenizer was saved."""
    tokens, kinds = vocabulary(tokenizer, num_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=num_rows).add_to_gguf(writer, quiet=True)


def vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Return a token and its kind for each row of the embedding. ModelRefused for a token without a row."""
    tokens = [f"[PAD{row}]" for row in range(num_rows)]
    kinds = [gguf.TokenType.UNUSED] * num_rows
    added = tokenizer.added_tokens_decoder
    for token, row in tokenizer.get_vocab().items():
        if row >= num_rows:
            raise ModelRefused(f"the token {token!r} has number {row}, and the model's embedding {num_rows} rows")
        special = added[row].special if row in added else None
        tokens[row] = token
        kinds[row] = {
            None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED
        }[special]  # fmt: skip
    return tokens, kinds


def _name_of(steps: list[dict[str, Any]]) -> str | None:
    *before, last = steps
    if last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):  # GPT-2's own expression
        if not before:
            return "gpt-2"
        is_digits = len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"]
        return "smollm" if is_digits else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    return BY_EXPRESSION.get(before[0]["pattern"].get("Regex"))


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer or a normalizer."""
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _shown(steps: list[dict[str, Any]]) -> str:
    return ", ".join(str(step.get("pattern", {}).get("Regex") or step["type"]) for step in steps)
