"""A policy with adapters on the disk: merged as a plain Hugging Face model, and the adapters alone as PEFT keeps them.

{folder}/config.json, model.safetensors ...     the model with its adapters added in: loads anywhere
         adapter/adapter_config.json            what PEFT needs to put the adapters onto the base
                 adapter_model.safetensors      base_model.model.<layer>.lora_A.weight, ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skyrl_train.policy.four_bit import four_bit_matrices
from skyrl_train.policy.lora import LoraLinear, adapters_of, effective_weight, is_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FOLDER = "adapter"


def save_merged(module: PreTrainedModel, folder: Path) -> None:
    """The model in Hugging Face format. With adapters: added to the base and rounded once, and the adapter folder."""
    adapted = adapters_of(module)
    if not adapted:
        module.save_pretrained(folder)
        return
    module.save_pretrained(folder, state_dict=merged_state(module, adapted))
    save_adapters(module, adapted, folder / ADAPTER_FOLDER)


def save_whole(
    module: PreTrainedModel,
    weights: dict[str, Tensor],
    adapters: dict[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write what `save_merged` would, of a module whose own weights are sharded.

    `weights`: merged and whole, of type `dtype`; `adapters`: lora_A and lora_B by their full names, whole.
    """
    kept = module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    with torch.device("meta"):
        shape_of_it = type(module)(module.config).to(dtype)
    shape_of_it.generation_config = module.generation_config
    shape_of_it.save_pretrained(folder, state_dict=weights | buffers)
    if adapters:
        adapted = adapters_of(module)
        write_adapters(module, adapted, adapters, folder / ADAPTER_FOLDER)


def merged_state(module: nn.Module, adapted: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """The state that the module would have, had it been trained whole."""
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    state |= {f"{name}.weight": matrix.whole() for name, matrix in four_bit_matrices(module).items()}
    return state | {f"{name}.weight": effective_weight(layer) for name, layer in adapted.items()}


def save_adapters(module: PreTrainedModel, adapted: dict[str, LoraLinear], folder: Path) -> None:
    adapters = {name: p.detach() for name, p in module.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    write_adapters(module, adapted, adapters, folder)


def write_adapters(
    module: PreTrainedModel, adapted: dict[str, LoraLinear], adapters: dict[str, Tensor], folder: Path
) -> None:
    """Write the adapters, by their full names, as PEFT keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.weight": adapter.contiguous() for name, adapter in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_peft_config(module, adapted), indent=2) + "\n")


def _peft_config(module: PreTrainedModel, adapted: dict[str, LoraLinear]) -> dict[str, Any]:
    layer = next(iter(adapted.values()))
    rank = len(layer.lora_A)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": module.config._name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": round(layer.scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _shortest_targets(module, list(adapted)),
    }


def _shortest_targets(module: nn.Module, adapted: list[str]) -> list[str]:
    """Last names where they mean exactly these layers, else full names."""
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return ends if [name for name in linears if is_named(name, ends)] == adapted else adapted
