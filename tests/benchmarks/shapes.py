"""Models of the sizes that people train, with random weights: nothing is downloaded, and speed is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skyrl_train.policy.model import Policy, wrap_module
from skyrl_train.policy.precision import choose_compute_dtype
from tests.tiny_models import BOS, CHATML, EOS, tiny_module

QWEN_PAD = "<|endoftext|>"  # transformers gives it to every tokenizer of a Qwen2

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.02,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.02,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.02,
    },
    "tiny": {"vocab_size": 512, "max_position_embeddings": 16_384},
}


def random_policy(shape: str, device: torch.device) -> Policy:
    """Make the model on the device: drawing half a billion random numbers on a CPU takes longer than all the rest."""
    return wrap_module(_random_module(shape, device))


def save_random_model(shape: str, folder: Path, device: torch.device) -> Path:
    """Write the model with a tokenizer that has a text for every id, as a Hugging Face folder, and return its path."""
    module = _random_module(shape, device).cpu()
    module.save_pretrained(folder)
    _tokenizer(module.config.vocab_size).save_pretrained(folder)
    return folder


def _random_module(shape: str, device: torch.device) -> Any:
    dtype, _ = choose_compute_dtype(device, None)
    with device:
        module = tiny_module("qwen2", dtype=dtype, **SHAPES[shape])
    return module.to(device)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tests.tiny_models with further tokens that no text becomes, but that can be read."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), BOS, EOS, QWEN_PAD]
    words += [f"<{index}>" for index in range(len(words), vocab_size)]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in (BOS, EOS, QWEN_PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=CHATML
    )
