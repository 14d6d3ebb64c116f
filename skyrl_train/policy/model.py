"""The policy: one causal language model that the learner trains and the engine samples from.

Both call `hidden_states` and `logits` on the same weights; only the attention object differs (see attention.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from loguru import logger
from torch import Tensor, nn

from skyrl_train.ops.cpu.passes import compile_beside
from skyrl_train.policy.attention import ATTENTION_NAME, Attention, PackedAttention, register_attention
from skyrl_train.policy.blocks import has_quick_head, quicken_blocks
from skyrl_train.policy.check import refuse_unlike_transformers
from skyrl_train.policy.model_files import load_module, load_tokenizer
from skyrl_train.policy.refusal import ModelRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "Attention",
    "ModelRefused",
    "PackedAttention",
    "Policy",
    "choose_compute_dtype",
    "choose_device",
    "load_policy",
    "load_tokenizer",
]


@dataclass(frozen=True)
class Policy:
    """A transformers causal language model behind two functions. `module` holds the weights, in the compute type."""

    module: PreTrainedModel
    gradient_checkpointing: bool = False

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        """input_ids, position_ids: [T], any number of sequences end to end -> [T, hidden], after the final norm."""
        self._set_training(self.gradient_checkpointing and torch.is_grad_enabled())
        base = self.module.base_model
        out = base(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, attention=attention)
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [*, hidden] -> [*, vocab]: the head, with the scaling or soft cap that the family puts behind it.

        `out`: where to write them, for policies that can.
        """
        head = cast(nn.Module, self.module.get_output_embeddings())
        logits = head(hidden) if out is None else head(hidden, out=out)
        config = self.config
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def writes_logits_into_room(self) -> bool:
        """Whether `logits` takes `out`."""
        return self.device.type == "cpu" and has_quick_head(self.module)

    @property
    def config(self) -> PretrainedConfig:
        return self.module.config.get_text_config()

    @property
    def context(self) -> int:
        """Tokens of a sequence at most."""
        return int(self.config.max_position_embeddings)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, key heads, numbers of a head): the keys of one token, and its values likewise."""
        config: Any = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, heads, size

    @property
    def weights(self) -> dict[str, Tensor]:
        """What makes it this policy, by name."""
        return dict(self.module.named_parameters())

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.module.dtype

    def _set_training(self, training: bool) -> None:
        """transformers checkpoints layers only in training mode. Dropout is off in both modes, see `load_policy`."""
        if self.module.training != training:
            self.module.train(training)


def load_policy(
    path: str | Path,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    model_config_kwargs: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    max_length: int | None = None,
) -> Policy:
    """Load the causal language model in folder (or hub id) `path`, weights in `compute_dtype`.

    Raises ModelRefused where its files are not a whole model, or where it is one that we would compute differently from
    transformers, checked up to sequences of `max_length` tokens. With bfloat16 the learner keeps its own float32 master
    weights, so learner and engine compute with the same numbers.
    """
    if torch.device(device).type == "cpu":
        compile_beside(compute_dtype)
    module = load_module(path, compute_dtype, model_config_kwargs or {}, trust_remote_code=trust_remote_code)
    return wrap_module(module.to(device), gradient_checkpointing=gradient_checkpointing, max_length=max_length)


def wrap_module(
    module: PreTrainedModel, *, gradient_checkpointing: bool = False, max_length: int | None = None
) -> Policy:
    """Return the policy around a module that exists already. Dropout is off: learner and engine compute the same."""
    register_attention()
    module.set_attn_implementation(ATTENTION_NAME)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            setattr(part, "attention_dropout", 0.0)  # noqa: B010 (a plain attribute of a family's attention module)
    quicken_blocks(module)
    module.eval()
    if gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(module, gradient_checkpointing)
    refuse_unlike_transformers(policy, max_length)
    return policy


def choose_device(wanted: str) -> torch.device:
    """ "auto": the GPU if there is one, else the CPU."""
    device = torch.device(wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "auto" and device.type == "cpu" and nvidia_driver() is not None:
        logger.warning(f"training on the CPU, although there is an NVIDIA driver: {_why_no_gpu()}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={wanted}, but torch finds no CUDA GPU on this machine: {_why_no_gpu()}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={wanted} is not supported; use auto, cpu or cuda")
    if device.type == "cuda":  # it plans each new shape for 60 ms to 1.7 s (H200), and here most shapes are new
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _why_no_gpu() -> str:
    """What torch and the driver say of themselves, and what to do."""
    ours, cuda, driver = f"torch {torch.__version__}", torch.version.cuda, nvidia_driver()
    if cuda is None:
        return (
            f"{ours} is a build without CUDA; install one with it (a +cpu wheel in a folder that UV_FIND_LINKS or "
            "PIP_FIND_LINKS names is taken before PyPI's), or use device=cpu"
        )
    needed = 580 if int(cuda.partition(".")[0]) >= 13 else 525
    if driver is None:
        return f"{ours} has CUDA {cuda}, but there is no NVIDIA driver; use device=cpu"
    if int(driver.partition(".")[0]) < needed:
        return (
            f"{ours} has CUDA {cuda}, which needs NVIDIA driver {needed} or later, but this one is {driver}; update "
            "the driver, install a torch for an older CUDA, or use device=cpu"
        )
    return (
        f"{ours} has CUDA {cuda}, and NVIDIA driver {driver} is new enough; see nvidia-smi and CUDA_VISIBLE_DEVICES "
        "for the GPUs that this process may use, or use device=cpu"
    )


def nvidia_driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the loaded NVIDIA driver."""
    try:
        text = told.read_text()
    except OSError:
        return None
    found = re.search(r"NVRM version:.*?\s(\d+\.[\d.]*\d)", text)
    return found and found[1]


def choose_compute_dtype(device: torch.device, wanted: bool | None) -> tuple[torch.dtype, str]:
    """The type of weights and products, and a sentence that says why. `wanted` None: decide here.

    Decided from what the processor can do, never from a timing: a resumed run must choose as the first one did.
    """
    if wanted is not None:
        dtype = torch.bfloat16 if wanted else torch.float32
        return dtype, f"computing in {_name(dtype)}, as the configuration asks"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"computing in bfloat16: {torch.cuda.get_device_name(device)} has it in hardware"
        return torch.float32, f"computing in float32: {torch.cuda.get_device_name(device)} has no bfloat16 in hardware"
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "computing in bfloat16: this processor multiplies bfloat16 matrices in hardware (AMX)"
    if torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "computing in bfloat16: this processor has bfloat16 dot products (AVX-512)"
    return torch.float32, "computing in float32: this processor has no fast bfloat16 products"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
