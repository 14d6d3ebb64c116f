"""The policy: one causal language model that the learner trains and the engine samples from.

Both call `hidden_states` and `logits` on the same weights; only the attention object differs (see attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from skyrl_train.ops import prepare
from skyrl_train.ops.base import Attention
from skyrl_train.policy.attention import ATTENTION_NAME, register_attention
from skyrl_train.policy.blocks import head_takes_out, replace_blocks
from skyrl_train.policy.check import refuse_unlike_transformers
from skyrl_train.policy.four_bit import freeze_in_four_bits
from skyrl_train.policy.model_files import load_module
from skyrl_train.policy.refusal import ModelRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Policy:
    """A transformers causal language model behind two functions. `module` holds the weights, in the compute type."""

    module: PreTrainedModel
    gradient_checkpointing: bool = False

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        """Return the hidden states [T, hidden] after the final norm.

        input_ids, position_ids [T]: any number of sequences end to end, which `attention` tells apart.
        """
        self._set_training(self.gradient_checkpointing and torch.is_grad_enabled())
        base = self.module.base_model
        out = base(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, attention=attention)
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits [*, vocab] of hidden states, with the scaling or soft cap that the family puts after it.

        `out`: where to write them, if `head_takes_out`.
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
    def head_takes_out(self) -> bool:
        """Return whether `logits` takes `out`."""
        return head_takes_out(self.module)

    def weights_changed(self) -> None:
        """Do nothing: a pass reads the weights where they are."""

    @property
    def config(self) -> PretrainedConfig:
        return self.module.config.get_text_config()

    @property
    def context(self) -> int:
        """Return the most tokens that a sequence may have."""
        return int(self.config.max_position_embeddings)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Return (layers, key heads, size of a head): the shape of one token's keys, and of its values."""
        config: Any = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, heads, size

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        return dict(self.module.named_parameters())

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.module.dtype

    def _set_training(self, training: bool) -> None:
        """Set the mode of what transformers checkpoints, in training mode alone; elsewhere that mode adds noise."""
        if self.module.training != training:
            for part in self.module.modules():
                part.training = training and hasattr(part, "gradient_checkpointing")
            self.module.training = training


def load_policy(
    path: str | Path,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    model_config_kwargs: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    four_bit: bool = False,
) -> Policy:
    """Load the causal language model in folder (or hub id) `path`, weights in `compute_dtype`.

    Raises ModelRefused where its files are not a whole model, or where it is one that we would compute differently from
    transformers, checked up to sequences of `max_length` tokens. With bfloat16 the learner keeps its own float32 master
    weights, so learner and engine compute with the same numbers. `four_bit`: the linear layers but the head are frozen
    in 4 bits (four_bit.py), for adapters on top.
    """
    prepare(torch.device(device), compute_dtype)
    module = load_module(path, compute_dtype, model_config_kwargs or {}, trust_remote_code=trust_remote_code)
    if four_bit:
        freeze_in_four_bits(module, device)
    return wrap_module(module.to(device), gradient_checkpointing=gradient_checkpointing, max_length=max_length)


def wrap_module(
    module: PreTrainedModel, *, gradient_checkpointing: bool = False, max_length: int | None = None
) -> Policy:
    """Return the policy around a module that exists already. Dropout is off: learner and engine compute the same."""
    register_attention()
    module.set_attn_implementation(ATTENTION_NAME)
    _drop_nothing(module)
    replace_blocks(module)
    module.eval()
    if gradient_checkpointing:
        if not module.supports_gradient_checkpointing:
            raise ModelRefused(
                f"{type(module).__name__} does not support gradient checkpointing; set "
                "trainer.gradient_checkpointing=false"
            )
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(module, gradient_checkpointing)
    refuse_unlike_transformers(policy, max_length)
    return policy


def _drop_nothing(module: PreTrainedModel) -> None:
    """Switch off whatever leaves out numbers or layers by chance: modules, and the probabilities that others keep."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
