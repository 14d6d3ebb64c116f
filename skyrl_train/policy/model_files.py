"""A model's files: configuration, weights and tokenizer, read whole or refused in one line.

transformers itself goes on where weights are missing (it trains random numbers instead) and leaves many other faults to
whatever computes with them first.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from loguru import logger

from skyrl_train.log_style import use_our_logs
from skyrl_train.policy.attention import ATTENTION_NAME, register_attention
from skyrl_train.policy.refusal import FOREIGN_ERRORS, ModelRefused, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 4  # names of weights in a message


def load_config(path: str | Path, changes: dict[str, Any], *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the model's configuration, with these `changes`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config, unknown = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **changes
        )
    except (*FOREIGN_ERRORS, StrictDataclassError) as error:
        raise ModelRefused(f"model {path}: its configuration cannot be read: {one_line(error)}") from error
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        raise ModelRefused(f"model_config_kwargs: {type(config).__name__} has no {names}")
    return config


def load_module(
    path: str | Path, dtype: torch.dtype, changes: dict[str, Any], *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Read the model with every weight from its files, all of them finite."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    use_our_logs("transformers", "huggingface_hub")
    register_attention()
    config = load_config(path, changes, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (*FOREIGN_ERRORS, SafetensorError, pickle.UnpicklingError) as error:
        if error.args == (ATTENTION_NAME,):  # a KeyError of a family with a table of its own attentions
            reason = f"{config.model_type} is not supported: its attention cannot be replaced by ours"
        else:
            reason = f"its weights cannot be loaded: {one_line(error)}"
        raise ModelRefused(f"model {path}: {reason}") from error
    module, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ModelRefused(
            f"model {path}: {len(missing)} weights are in none of its files ({_some(missing)}), so random numbers "
            "would be trained; fetch or export the model again"
        )
    if unused := sorted(found["unexpected_keys"]):
        logger.warning(f"model {path}: {type(module).__name__} does not use {len(unused)} weights ({_some(unused)})")
    _refuse_unless_finite(path, module)
    return module


def _refuse_unless_finite(path: str | Path, module: PreTrainedModel) -> None:
    weights = [*module.named_parameters(), *module.named_buffers()]
    broken = [name for name, weight in weights if not _is_finite(weight, isinstance(weight, torch.nn.Parameter))]
    if broken:
        raise ModelRefused(
            f"model {path}: {len(broken)} weights have numbers that are NaN or infinite ({_some(broken)}); fetch or "
            "export the model again"
        )


def _is_finite(weight: torch.Tensor, is_parameter: bool) -> bool:
    if not weight.is_floating_point() or not weight.numel():
        return True
    ends = torch.stack(torch.aminmax(weight))  # both are NaN as soon as one number is
    return bool(ends.isfinite().all() if is_parameter else not ends.isnan().any())  # a buffer may be a bound, or a mask


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Read the tokenizer in folder (or hub id) `path`. Without a padding token, the end-of-sequence token serves."""
    from transformers import AutoTokenizer

    use_our_logs("transformers", "huggingface_hub")
    try:
        tokenizer = cast(
            "PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        )
    except FOREIGN_ERRORS as error:
        raise ModelRefused(f"model {path}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, num_rows: int, prompt_ids: list[int]) -> None:
    """Make sure that no text becomes a token behind the `num_rows` of the model's embedding.

    Added tokens there that nothing needs are taken out of the tokenizer, so that their text is read as any other text:
    some published text models keep the image tokens of a larger sibling. Whatever is needed is refused.
    prompt_ids: of any conversation, as the chat template prints it.
    """
    added = tokenizer.added_tokens_decoder
    outside = {i: token for token, i in tokenizer.get_vocab().items() if i >= num_rows}
    if not outside:
        return
    if tokenizer.pad_token_id in outside and tokenizer.eos_token_id not in outside:
        tokenizer.pad_token = tokenizer.eos_token  # nothing is padded here
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id]
    needed = {i for i in outside if i not in added or i in prompt_ids or i in named}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if needed or backend is None:
        shown = ", ".join(f"{outside[i]!r} is {i}" for i in sorted(needed or outside)[:SHOWN])
        raise ModelRefused(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {num_rows} rows: "
            f"{len(needed or outside)} tokens that are needed have none ({shown}); take the model's own tokenizer"
        )
    _take_out(tokenizer, set(outside))
    logger.warning(f"tokens without a row in the model's embedding are read as text: {_some(sorted(outside.values()))}")


def _take_out(tokenizer: Any, ids: set[int]) -> None:
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] not in ids]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
