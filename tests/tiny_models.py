"""Tiny real models with random weights and a byte-level tokenizer, for tests of engine, learner and trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from skyrl_train.policy.model import Policy, wrap_module

BOS, EOS = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 258  # 256 bytes, then BOS and EOS


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, in byte-level alphabet order, and ChatML's two special tokens."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=CHATML
    )


def tiny_bpe_tokenizer(expression: str | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 400 tokens, with ChatML's two special tokens and one that is not special.

    expression: what cuts text into words before the merges; None: GPT-2's own.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if expression is not None:
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=397, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([str(number) for number in range(500)] + [CHATML, __doc__ or ""], trainer)
    backend.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=CHATML
    )


def tiny_policy(
    family: str = "llama",
    *,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    device: torch.device | str = "cpu",
    **config: Any,
) -> Policy:
    """Return a random model of this family: 2 layers, 4 query and 2 key heads of 8, 258 tokens, a context of 512.

    `config` overrides the family's configuration, e.g. `vocab_size=16` or `num_hidden_layers=3`.
    """
    module = tiny_module(family, seed=seed, **config).to(device, compute_dtype)
    return wrap_module(module, gradient_checkpointing=gradient_checkpointing)


def save_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **config: Any) -> Path:
    """Write the model and the tokenizer as a Hugging Face folder, as a user names one, and return its path."""
    tiny_module(family, seed=seed, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_module(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Return the model as transformers makes it, without a Policy around it."""
    eos = VOCAB_SIZE - 1
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # larger than usual, so that the logits of a random model differ clearly
        "bos_token_id": eos - 1,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    if not hasattr(AutoConfig.for_model(family), "num_key_value_heads"):
        del settings["num_key_value_heads"]  # else the configuration would say what the family does not do
    config = AutoConfig.for_model(family, **(settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    return module
