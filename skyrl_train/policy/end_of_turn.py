"""The tokens that end a reply: one list for the engine, which stops at them, and for the chat, which goes on there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def end_of_turn_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of the generation configuration and the tokenizer's own end-of-sequence token, sorted."""
    configured: int | Sequence[int] | None = generation_config.eos_token_id if generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if isinstance(tokenizer.eos_token_id, int):
        ids.append(tokenizer.eos_token_id)
    return tuple(sorted(set(ids)))


def read_generation_config(model: str, **config_kwargs: Any) -> GenerationConfig:
    """The generation configuration that transformers will give the model, read without its weights.

    model: a folder or hub id. config_kwargs: overrides of the model's configuration, which counts where the model has
    no generation_config.json.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # there is no such file
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, **config_kwargs))
