"""The memory that a model needs, from its configuration alone: it is built on the meta device, which has no memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from skyrl_train.ops import cuda
from skyrl_train.policy.attention import ATTENTION_NAME, register_attention
from skyrl_train.policy.blocks import has_known_blocks
from skyrl_train.policy.logprobs import BYTES_PER_CHUNK, SHARE_OF_GPU
from skyrl_train.policy.lora import adapted_names
from skyrl_train.policy.memory_plan import (
    GIB,
    Demands,
    Device,
    DoesNotFit,
    MemoryPlan,
    ModelMemory,
    memory_plan,
)
from skyrl_train.policy.model import Policy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from skyrl_train.config import GeneratorConfig, LoraConfig, OptimizerConfig, TrainerConfig

MEASURED_TOKENS = 64
LEAST_FREE_SHARE = 0.9  # the rest is the driver's own
UNKNOWN_FACTOR = 40  # hidden sizes that a token's activations take in a layer that cannot be measured


def plan_of_run(
    module: PreTrainedModel,
    trainer: TrainerConfig,
    generator: GeneratorConfig,
    device: torch.device,
    *,
    reference_weights: int,
    critic: PreTrainedModel | None = None,
    engine_share: float | None = None,
) -> MemoryPlan:
    """Return the memory plan of a run with this model (on the meta device), and log it. Raises `DoesNotFit`.

    critic: the model of a critic with a trunk of its own. engine_share: of the GPU, for an engine of another process
    that sleeps during updates; None: the engine is in this process.
    """
    policy = trainer.policy
    model = _memory_on(device, module, policy.model.lora, policy.optimizer_config)
    model = replace(model, is_four_bit=policy.model.load_in_4bit)
    context = module.config.get_text_config().max_position_embeddings
    here = gpu(device, whole=trainer.deterministic)
    demands = Demands.of(trainer, generator, context, reference_weights)
    if critic is not None:
        is_tied = critic.config.get_text_config().tie_word_embeddings
        trunk = _memory_on(device, critic, trainer.critic.model.lora, trainer.critic.optimizer_config)
        trunk = trunk.as_critic(is_tied=is_tied)
        demands = replace(demands, critic=trunk)
    if engine_share is not None:
        demands = replace(demands, engine_bytes=int(engine_share * here.total))
    plan = memory_plan(model, demands, here)
    logger.info(plan.line(here))
    return plan


def _memory_on(
    device: torch.device, module: PreTrainedModel, lora: LoraConfig, optimizer: OptimizerConfig
) -> ModelMemory:
    has_flash = cuda.has_flash(device, module.dtype, head_dim(module.config.get_text_config()))
    model = model_memory(module, lora, has_flash=has_flash, is_fused=cuda.has_fused_blocks())
    return replace(model, optim=optimizer.optim)


def num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def gpu(device: torch.device, *, whole: bool) -> Device:
    """The GPU as it is now. `whole`: all of it is planned with, for every run alike; refused if others use it."""
    free, total = torch.cuda.mem_get_info(device)
    if whole and free < LEAST_FREE_SHARE * total:
        raise DoesNotFit(
            f"trainer.deterministic=true needs the GPU for itself, so that every run plans the same, but "
            f"{(total - free) / GIB:.1f} of its {total / GIB:.1f} GiB are taken: end what else runs on it, or drop the "
            "key"
        )
    return Device(
        name=torch.cuda.get_device_name(device),
        total=total,
        available=total if whole else free,
        logits_bytes=max(BYTES_PER_CHUNK, int(SHARE_OF_GPU * total)),
    )


def meta_module(path: str, dtype: torch.dtype, overrides: dict[str, Any]) -> PreTrainedModel:
    """The model in folder (or hub id) `path` without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    config: PretrainedConfig = AutoConfig.from_pretrained(path, **overrides)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)


def model_memory(module: PreTrainedModel, lora: LoraConfig, *, has_flash: bool, is_fused: bool) -> ModelMemory:
    """Return what the model holds; module: on the meta device.

    `has_flash`: whether attention is one flash call; `is_fused`: whether blocks are fused kernels.
    """
    config: Any = module.config.get_text_config()
    head: Any = module.get_output_embeddings()
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    sides = {name: sum(layer.weight.shape) for name, layer in linears.items() if layer is not head}
    sizes = [linears[name].weight.numel() for name in sides]
    adapted = sides if lora.rank == 0 else adapted_names(Policy(module), lora)
    adapters = lora.rank * sum(sides[name] for name in adapted)
    num_base = num_weights(module)
    thin = lora.rank * len(adapted) * module.dtype.itemsize // config.num_hidden_layers  # kept by each adapter
    is_formula = is_fused and has_known_blocks(config)
    layer_bytes = fused_layer_bytes(config, module.dtype) if is_formula else measured_layer_bytes(module)
    return ModelMemory(
        num_weights=num_base + adapters,
        num_trained=adapters or num_base,
        head_weights=0 if adapters or head is None else head.weight.numel(),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        itemsize=module.dtype.itemsize,
        layer_bytes=layer_bytes + thin,
        layer_kv_bytes=2 * _kv_heads(config) * head_dim(config) * module.dtype.itemsize,
        has_flash=has_flash,
        logits_copies=_logits_copies(config),
        linear_sides=sum(sides.values()),
        linear_weights=sum(sizes),
        widest_linear=max(sizes, default=0),
    )


def fused_layer_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes per token that a block of fused kernels keeps for backward.

    The row before and after attention; queries, keys and values, turned in place; what attention gives, and a float32
    per head; gate and up. What the norms give, and the product of gate and up, is made again (ops/recomputed.py).
    """
    heads = config.num_attention_heads
    queries, keys = heads * head_dim(config), _kv_heads(config) * head_dim(config)
    numbers = 2 * config.hidden_size + 2 * queries + 2 * keys + 2 * config.intermediate_size
    if config.model_type == "qwen3":  # queries and keys before their norm as well
        numbers += queries + keys
    return numbers * dtype.itemsize + 4 * heads + 8  # and a float32 per norm


def measured_layer_bytes(module: PreTrainedModel) -> int:
    """Bytes per token and layer that transformers' own blocks keep for backward, of distinct tensors."""
    config: Any = module.config.get_text_config()
    seen: dict[int, Tensor] = {}  # held, so that no address is used twice
    weights = {weight.untyped_storage()._cdata for weight in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(1, MEASURED_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(MEASURED_TOKENS, device="meta")[None]
    with suppress(NotImplementedError, RuntimeError), saved_tensors_hooks(keep, lambda tensor: tensor):
        module.base_model(input_ids=ids, position_ids=positions, use_cache=False, attention=_Attention())
        total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
        return total // (MEASURED_TOKENS * config.num_hidden_layers)
    return UNKNOWN_FACTOR * config.hidden_size * module.dtype.itemsize  # a family that looks at numbers, such as MoE


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _logits_copies(config: Any) -> int:
    """Return how many copies of a chunk of logits exist at once (`Policy.logits`): a factor adds one, a cap three."""
    if getattr(config, "final_logit_softcapping", None) is not None:
        return 4
    scales = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale"))
    return 1 if all(scale is None for scale in scales) else 2


class _Attention:
    """Keeps what a GPU's attention keeps, whatever kernel it is."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        return _Attended.apply(query, key, value)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("only what is kept is of interest")
