"""Settings of the policy and the reference: their weights, adapters and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import II

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section

SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
)  # fmt: skip
OPTIMIZERS = ("adamw", "adamw_8bit")
LORA_STARTS = ("kaiming", "xavier", "normal")


@dataclass
class LoraConfig(Section, at="trainer.policy.model.lora"):
    """Adapters instead of full fine-tuning: only the adapters are trained, the model itself does not change."""

    rank: int = 0  # rank of the adapters; 0 is full fine-tuning
    alpha: int = 16  # the adapters' product is multiplied by alpha / rank
    dropout: float = 0.0  # dropout on the adapters' input; only 0 is possible
    target_modules: Any = "all-linear"  # layers that get an adapter: "all-linear" (all but the output head) or names
    exclude_modules: Any = None  # names of layers that get no adapter; a name may be the last parts of the full name
    init_method: str = "kaiming"  # how A starts: kaiming or xavier, or normal with deviation 1 / rank; B starts at 0

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(0, "rank")
        yield from self.at_least(1, "alpha")
        yield from self.one_of("init_method", LORA_STARTS)
        if self.dropout != 0:
            yield self.problem(
                "dropout",
                "is not possible: the engine samples without dropout, so with it the update would compare sampled "
                "tokens with another policy's logprobs, and the ratio would not begin at 1; drop it",
            )
        if not self.target_modules or not _are_names(self.target_modules):
            yield self.problem("target_modules", "must be all-linear or names of modules, such as [q_proj,v_proj]")
        if self.exclude_modules is not None and not _are_names(self.exclude_modules):
            yield self.problem("exclude_modules", "must be names of modules, such as [gate_proj,up_proj], or null")
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if self.rank == 0 and value != field_.default:
                yield self.problem(field_.name, "has no effect with rank=0; drop it, or use adapters with rank=16")


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value))


@dataclass
class ModelConfig(Section, at="trainer.policy.model"):
    """The policy's weights."""

    path: str = "Qwen/Qwen2.5-1.5B-Instruct"  # a model's name on the hub, or its folder
    load_in_4bit: bool = False  # QLoRA: the frozen weights under the adapters rest in 4 bits (NF4), except embeddings
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class RefModelConfig(Section, at="trainer.ref.model"):
    """The reference policy's weights."""

    path: str = II("trainer.policy.model.path")  # follows the policy's path; with distillation it is the teacher


@dataclass
class OptimizerConfig(Section, at="trainer.policy.optimizer_config"):
    """AdamW and its schedule."""

    lr: float = 1e-6  # peak learning rate
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    weight_decay: float = 0.01  # decoupled weight decay
    max_grad_norm: float = 1.0  # gradients are scaled down to this total norm; <= 0 turns clipping off
    num_warmup_steps: int = 0  # optimizer steps over which the rate rises from 0
    scheduler: str = "constant_with_warmup"  # a transformers schedule, by name
    optim: str = "adamw"  # adamw: both moments are float32; adamw_8bit: 8 bits, blocks of 256 numbers share a scale

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(0, "lr", "weight_decay", "num_warmup_steps")
        yield from self.finite("lr", "weight_decay")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            yield self.problem("adam_betas", "must be two numbers, each from 0 to below 1")
        yield from self.one_of("scheduler", SCHEDULES)
        if self.optim.startswith("paged_"):
            yield self.problem(
                "optim",
                "is not possible: bitsandbytes pages moments on GPUs alone, through managed memory that looks like the "
                "host's and that no checkpoint here reads; use adamw_8bit, whose moments take a quarter of the memory",
            )
        else:
            yield from self.one_of("optim", OPTIMIZERS)


@dataclass
class FSDPConfig(Section, at="trainer.policy.fsdp_config"):
    """The sharding of the policy over ranks."""

    cpu_offload: bool = False  # each rank's rows of weights and optimizer rest in host memory


@dataclass
class PolicyConfig(Section, at="trainer.policy"):
    """The model that learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    model_config_kwargs: dict[str, Any] = field(default_factory=dict)  # overrides of the Hugging Face model config


@dataclass
class RefConfig(Section, at="trainer.ref"):
    """The frozen model that the KL term compares with; loaded only when a KL term is on."""

    model: RefModelConfig = field(default_factory=RefModelConfig)
    model_config_kwargs: dict[str, Any] = field(default_factory=dict)  # overrides of the Hugging Face model config
