"""Tiny models of every causal family that transformers knows: random, of a few layers, with windows of 24 tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skyrl_train.policy.refusal import FOREIGN_ERRORS, one_line

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_WEIGHTS = 20_000_000
# Every name by which some family calls a size; each configuration is given those that it knows.
_SIZES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size_per_layer_input",),
    "hidden_size": ("n_embd", "d_model", "embed_dim", "embedding_size", "input_embedding_size", "word_embed_proj_dim",
                    "lru_width"),
    "intermediate_size": ("ffn_hidden_size", "ffn_dim", "n_inner", "d_ff", "inner_dim", "mamba_d_ssm"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
                            "attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
                            "moe_num_experts", "mamba_n_heads", "conv_kernel", "time_step_rank",
                            "linear_num_value_heads"),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num", "num_experts_per_tok", "num_experts_per_token",
                            "top_k_experts", "moe_topk", "moe_k", "encoder_layers", "mamba_expand", "expand",
                            "linear_num_key_heads"),
    "head_dim": ("kv_channels", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim",
                 "state_size", "mamba_d_state", "linear_key_head_dim", "linear_value_head_dim",
                 "hidden_size_per_layer_input", "query_pre_attn_scalar"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len"),
    "sliding_window": ("attention_window", "window_size", "attention_chunk_size"),
    "moe_intermediate_size": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "q_lora_rank",
                              "mamba_d_head"),
    "n_group": ("topk_group", "first_k_dense_replace", "n_shared_experts"),
    "num_kv_shared_layers": (),
    "image_size": (),
    "patch_size": (),
    "is_decoder": (),
    "bos_token_id": (),
    "eos_token_id": ("pad_token_id",),
    "initializer_range": (),
}  # fmt: skip
_VALUES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "sliding_window": 24,
    "moe_intermediate_size": 16, "n_group": 1, "num_kv_shared_layers": 0, "image_size": 28, "patch_size": 14,
    "is_decoder": True, "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.2,
}  # fmt: skip
SIZES = {name: _VALUES[first] for first, others in _SIZES.items() for name in (first, *others)}


class CannotBuild(RuntimeError):
    """The family needs a special combination of sizes, or a library that is not installed."""


def tiny_family(family: str) -> Any:
    """Return a random model of this family, in float32."""
    try:
        config = _config(CONFIG_MAPPING[family])
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_WEIGHTS:
            raise CannotBuild(f"{family}: {size / 1e6:.0f} million weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (*FOREIGN_ERRORS, StrictDataclassError) as error:
        raise CannotBuild(f"{family}: {one_line(error)}") from error
    module.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=257)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():  # some families leave to others what their weights begin with
            if weight.ndim > 1 and not weight.any():
                weight.normal_(0, 0.05, generator=generator)
    return module


def _config(config_class: Any) -> Any:
    parts = {name: _known_sizes(part) for name, part in getattr(config_class, "sub_configs", {}).items()}
    return config_class(**_known_sizes(config_class), **parts)


def _known_sizes(config_class: Any) -> dict[str, Any]:
    arguments = set(inspect.signature(config_class.__init__).parameters)
    known = arguments | set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "head_dim" not in arguments or "qk_nope_head_dim" in sizes:
        sizes.pop("head_dim", None)  # it follows from the others
    return sizes
