"""A model as one GGUF file, the format of llama.cpp and of what is built on it (Ollama, LM Studio).

Names of tensors, keys and types of numbers are those of the package `gguf`, which llama.cpp's authors keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from skyrl_gym.temporary_folders import EXPORTED, temporary_folder
from skyrl_train.policy.end_of_turn import end_of_turn_ids
from skyrl_train.policy.gguf_vocabulary import add_vocabulary, pre_tokenizer_name, vocabulary
from skyrl_train.policy.lora import adapters_of
from skyrl_train.policy.lora_files import merged_state
from skyrl_train.policy.refusal import ModelRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp computes a family. biases: of which of its tensors it reads a bias.

    rotates_pairs: it rotates neighbouring dimensions, so the rows of queries and keys change their places.
    """

    arch: str
    biases: tuple[str, ...] = ()
    rotates_pairs: bool = False


LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
LLAMA = Family("llama", LINEARS, rotates_pairs=True)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": Family("qwen2", LINEARS[:3]), "qwen3": Family("qwen3")}
KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def refuse_unless_gguf(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelRefused, with the reason, for a model that llama.cpp would not compute as transformers does."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelRefused(f"GGUF is written for {', '.join(FAMILIES)}; this model is of the type {kind}")
    rope = _rope(config)
    reasons = {
        f"hidden_act={config.hidden_act}": config.hidden_act != "silu",
        "sliding windows": _has_windows(config),
        f"rope_type={rope['rope_type']}": rope["rope_type"]
        not in ("default", *(["llama3"] if kind == "llama" else [])),
        "heads that are narrower or wider than hidden_size": kind == "qwen2"
        and _head_dim(config) * config.num_attention_heads != config.hidden_size,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ModelRefused(f"GGUF is not written for a {kind} with {reason}")
    pre_tokenizer_name(tokenizer)
    vocabulary(tokenizer, config.vocab_size)


def write_gguf(
    path: Path, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dtype: str, name: str, about: str
) -> None:
    """Write the model, adapters merged, as `refuse_unless_gguf` lets it pass.

    dtype: of the matrices; vectors are float32. With q8_0, so are matrices whose rows are no multiple of 32.
    """
    config, family = module.config, FAMILIES[module.config.model_type]
    kind, file_type = KINDS[dtype]
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_description(about)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    with temporary_folder(EXPORTED) as folder:
        tokenizer.save_pretrained(folder)
        add_vocabulary(writer, tokenizer, folder, config.vocab_size)
    for token in end_of_turn_ids(module.generation_config, tokenizer):
        if token != tokenizer.eos_token_id:
            writer.add_eot_token_id(token)
            break
    tensors = dict(_tensors(module, family))
    kinds = {name: _kind_of(tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        numbers = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())
        if not np.isfinite(numbers).all():
            raise ModelRefused(f"{name} has numbers that {dtype} cannot hold; choose another --dtype")
        writer.write_tensor_data(gguf.quantize(numbers, kinds[name]).view(np.uint8))
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    head_dim = _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _tensors(module: PreTrainedModel, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's name and layout of each weight. ModelRefused for one that it would not read."""
    config = module.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for ours, tensor in merged_state(module, adapters_of(module)).items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        layer = name.split(".")[-2] if name else ""
        if name is None or (name.endswith(".bias") and layer not in family.biases):
            raise ModelRefused(f"GGUF has no place for {ours} in a {family.arch}")
        yield name, _in_pairs(tensor, heads[layer]) if family.rotates_pairs and layer in heads else tensor
    if (factors := _rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def _in_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Put the two rows that are rotated together next to each other: 0 1 2 3 becomes 0 2 1 3 in a head of 4."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _kind_of(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.ndim > 1 and tensor.shape[-1] % block == 0 else GGMLQuantizationType.F32


def _rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return by what each frequency is divided, [head_dim / 2]; None where none is."""
    rope = _rope(config)
    if rope["rope_type"] == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    half = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return rope["rope_theta"] ** -half / scaled


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return config.rope_parameters


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has_windows(config: PretrainedConfig) -> bool:
    """Return whether a layer attends to fewer tokens than there are."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
