"""Rules that look at several sections at once, and warnings that refuse nothing."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skyrl_train.config.data import DataConfig
from skyrl_train.config.environment import EnvironmentConfig
from skyrl_train.config.generator import GeneratorConfig
from skyrl_train.config.problems import NO_VALUE, Problem, written
from skyrl_train.config.trainer import LOGGERS, TrainerConfig

LEAST_LORA_LR = 1e-5
SHARED_MEMORY, NCCL, GLOO = WAYS_OF_WEIGHTS = "shared_memory", "nccl", "gloo"
INSTALL_QUANTIZED = "uv sync --inexact --extra quantized (pip install 'skyrl-train[quantized]')"
# The reductions with which these losses were published; gspo with the sum over tokens is LUSPO.
PUBLISHED_REDUCTIONS = {
    "gspo": ("sequence_mean", "seq_mean_token_sum_norm"),
    "gmpo": ("sequence_mean",),
    "sapo": ("sequence_mean",),
}
COMPARE_SIBLINGS = ("grpo", "rloo", "maxrl", "opo", "gpg", "pass_at_k", "gdpo")  # the episodes of one prompt


def problems_across_sections(data: DataConfig, trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    """Return the problems that no section can find alone."""
    yield from length_problems(trainer, generator)
    yield from estimator_problems(trainer, generator)
    yield from dynamic_sampling_problems(trainer, generator)
    yield from overlong_problems(trainer, generator)
    yield from agent_problems(trainer, generator)
    yield from adapter_problems(trainer)
    yield from quantized_problems(trainer)
    yield from weight_sync_problems(trainer, generator)
    yield from tracker_problems(trainer)
    if not data.train_data:
        yield Problem("data.train_data", [], "is empty; give at least one .parquet, .json or .jsonl file or hub name")


def length_problems(trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    longest_prompt, longest_input = trainer.max_prompt_length, generator.max_input_length
    if generator.max_turns == 1 and longest_input != longest_prompt:
        yield Problem(
            "generator.max_input_length",
            longest_input,
            f"must equal trainer.max_prompt_length={longest_prompt} while generator.max_turns=1: "
            "the prompt is the only input; drop one of the two, or raise generator.max_turns",
        )
    elif longest_input < longest_prompt:
        yield Problem(
            "generator.max_input_length",
            longest_input,
            f"is less than trainer.max_prompt_length={longest_prompt}, so the longest prompts could not be played; "
            f"use at least {longest_prompt}",
        )


def dynamic_sampling_problems(trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    sampling = trainer.algorithm.dynamic_sampling
    if sampling.type is not None and generator.n_samples_per_prompt == 1:
        yield Problem(
            "trainer.algorithm.dynamic_sampling.type",
            sampling.type,
            "compares the episodes of a prompt, and generator.n_samples_per_prompt=1 gives it one; raise that, or drop "
            "dynamic_sampling.type",
        )


def overlong_problems(trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    size, longest = trainer.algorithm.overlong_penalty.len, generator.sampling_params.max_generate_length
    if size > longest:
        yield Problem(
            "trainer.algorithm.overlong_penalty.len",
            size,
            f"is more than a reply can have (generator.sampling_params.max_generate_length={longest}), so an empty one "
            f"would be penalised; use less than {longest}",
        )


def estimator_problems(trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    estimator = trainer.algorithm.advantage_estimator
    if estimator == "gae" and not trainer.critic.is_on:
        yield Problem(
            "trainer.algorithm.advantage_estimator",
            estimator,
            "compares with the values of a critic, and there is none; use trainer.critic.model.path="
            f"{trainer.policy.model.path} for one of its own, or trainer.critic.shares_policy=true for a head alone",
            (written("trainer.critic.model.path", trainer.policy.model.path),),
            drops=(),
        )
    if estimator == "distillation" and trainer.reference_is_base:
        yield Problem(
            "trainer.algorithm.advantage_estimator",
            estimator,
            "needs a teacher; set trainer.ref.model.path to another model with the policy's tokenizer",
            drops=(),  # without the estimator the rewards would be learned from, which nobody asked for
        )
    if estimator == "distillation" and trainer.algorithm.distillation.reward_weight > 0:
        estimator = "grpo"  # it compares the episodes of a prompt, too
    if estimator in COMPARE_SIBLINGS and generator.n_samples_per_prompt == 1:
        yield Problem(
            "generator.n_samples_per_prompt",
            1,
            f"gives {estimator} nothing to compare with, so every advantage would be 0; "
            "use at least 2, or trainer.algorithm.advantage_estimator=reinforce++",
        )


def agent_problems(trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    if generator.agent is not None and trainer.deterministic:
        yield Problem(
            "generator.agent",
            generator.agent,
            "asks whenever it likes, so no two runs are equal; drop trainer.deterministic=true",
            drops=("trainer.deterministic",),
        )


def reward_problems(environment: EnvironmentConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    if environment.reward is not None and generator.agent is not None:
        yield Problem(
            "environment.reward",
            environment.reward,
            f"is never called: generator.agent={generator.agent} pays its own episodes; drop one of the two",
        )
    if generator.agent is None:
        return
    for name, value in environment.rewards.items():
        if not isinstance(value, int | float):
            yield Problem(
                f"environment.rewards.{name}",
                NO_VALUE,
                f"is never called: generator.agent={generator.agent} pays its own episodes; write the weight of what "
                "it pays under this name, or drop it",
            )


def named_reward_problems(environment: EnvironmentConfig, trainer: TrainerConfig) -> Iterator[Problem]:
    algorithm = trainer.algorithm
    if algorithm.advantage_estimator == "gdpo" and (environment.reward is not None or len(environment.rewards) == 1):
        yield Problem(
            "trainer.algorithm.advantage_estimator",
            "gdpo",
            "normalises several named rewards apart, and there is one; name more in environment.rewards, or use grpo",
        )
    judges = [name for name, value in environment.rewards.items() if "judge" in (value, _function_of(value))]
    if trainer.deterministic and judges:
        yield Problem(
            f"environment.rewards.{judges[0]}",
            NO_VALUE,
            "asks a judge, whose answers no run can repeat; drop trainer.deterministic=true",
            drops=("trainer.deterministic",),
        )


def _function_of(value: Any) -> Any:
    return value.get("function") if isinstance(value, dict) else None


def adapter_problems(trainer: TrainerConfig) -> Iterator[Problem]:
    if trainer.policy.model.lora.rank > 0 and trainer.update_ref_every_epoch and not trainer.reference_is_base:
        yield Problem(
            "trainer.update_ref_every_epoch",
            True,
            "cannot give adapters to another model than the policy's own; drop trainer.ref.model.path and "
            "trainer.ref.model_config_kwargs, or use trainer.policy.model.lora.rank=0",
        )


def quantized_problems(trainer: TrainerConfig) -> Iterator[Problem]:
    """Weights and moments in few bits: what they need, and where they are not possible."""
    asked: list[tuple[str, object]] = []
    if trainer.policy.model.load_in_4bit:
        asked.append(("trainer.policy.model.load_in_4bit", True))
        if trainer.policy.model.lora.rank == 0:
            yield Problem(
                "trainer.policy.model.load_in_4bit",
                True,
                "freezes the model, and without adapters nothing is left to train; use lora.rank=16",
                ("trainer.policy.model.lora.rank=16",),
                drops=(),
            )
    for name in ("policy", "critic"):
        optimizer = getattr(trainer, name).optimizer_config
        if optimizer.optim != "adamw":
            asked.append((f"trainer.{name}.optimizer_config.optim", optimizer.optim))
    for key, value in asked:
        if trainer.strategy != "single":
            yield Problem(
                key,
                value,
                f"is not possible with trainer.strategy={trainer.strategy}: the blocks that share a scale are not "
                "sharded; use trainer.strategy=single, or drop it",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            yield Problem(key, value, f"needs the package bitsandbytes: {INSTALL_QUANTIZED}, or drop it")


def weight_sync_problems(trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[Problem]:
    """SkyRL's nccl stands for the best way: CUDA IPC or NCCL on GPUs, else shared memory (placement.py)."""
    key, backend, placement = "generator.weight_sync_backend", generator.weight_sync_backend, trainer.placement
    if backend not in WAYS_OF_WEIGHTS:
        yield Problem(
            key,
            backend,
            f"is not a way of new weights to the engines; use {SHARED_MEMORY}, {NCCL} or {GLOO}",
            (f"{key}={SHARED_MEMORY}",),
        )
    if backend != GLOO:
        return
    is_single = placement.colocate_all and placement.num_ranks == generator.num_inference_engines == 1
    if is_single and trainer.strategy == "single" and generator.backend == "torch":
        yield Problem(key, GLOO, "has no effect where learner and engine are one process, which shares them; drop it")
    elif trainer.device == "cuda":
        yield Problem(key, GLOO, f"is for processes on a CPU; use {NCCL}, or trainer.device=cpu", (f"{key}={NCCL}",))
    elif placement.policy_num_nodes > 1:
        yield Problem(key, GLOO, f"joins processes of one machine; use {SHARED_MEMORY}", (f"{key}={SHARED_MEMORY}",))


def tracker_problems(trainer: TrainerConfig) -> Iterator[Problem]:
    for name in trainer.loggers:
        if name not in LOGGERS or name == "console":
            continue
        others = [other for other in trainer.loggers if other != name]
        fix = (written("trainer.logger", others),) if others else ()
        if importlib.util.find_spec(name) is None:
            says = f"needs the package {name}: pip install {name}, or use trainer.logger=console"
            yield Problem("trainer.logger", name, says, fix)
        elif name == "wandb" and not has_wandb_key():
            yield Problem(
                "trainer.logger",
                name,
                "needs WANDB_API_KEY in the environment (or `wandb login`, or WANDB_MODE=offline); "
                "or use trainer.logger=console",
                fix,
            )


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and any("wandb" in host for host in netrc.netrc(path).hosts)


def advice(data: DataConfig, trainer: TrainerConfig, generator: GeneratorConfig) -> Iterator[str]:
    """Return a sentence for each setting that is allowed but rarely intended."""
    algorithm = trainer.algorithm
    loss, reduction = algorithm.policy_loss_type, algorithm.loss_reduction
    if reduction not in PUBLISHED_REDUCTIONS.get(loss, (reduction,)):
        yield (
            f"trainer.algorithm.policy_loss_type={loss} was published with loss_reduction=sequence_mean, here it is "
            f"{reduction}"
        )
    stops = generator.sampling_params.stop
    if generator.max_turns != 1 and stops and not generator.append_eos_token_after_stop_str_in_multi_turn:
        yield (
            "turns that end on a stop string stay open in the chat, because "
            "generator.append_eos_token_after_stop_str_in_multi_turn=false"
        )
    lora, lr = trainer.policy.model.lora, trainer.policy.optimizer_config.lr
    if lora.rank > 0 and lr < LEAST_LORA_LR:
        yield (
            f"trainer.policy.optimizer_config.lr={lr} hardly moves adapters, which learn at 10 to 100 times the rate "
            "of full fine-tuning: begin with 1e-4"
        )
    if trainer.eval_interval > 0 and not data.val_data:
        yield "no evaluation: data.val_data is empty"
