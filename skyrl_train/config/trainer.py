"""The loop: how many prompts per step, how long, where it runs, what it saves and where it reports."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.models import CriticConfig, PolicyConfig, RefConfig
from skyrl_train.config.section import Problem, Section

LOGGERS = ("console", "tensorboard", "wandb", "mlflow", "trackio", "swanlab")


@dataclass
class PlacementConfig(Section):
    """Which GPUs hold which model."""

    colocate_all: bool = True  # all models and engines share the same devices
    colocate_policy_ref: bool = True  # policy and reference share their devices
    policy_num_nodes: int = 1  # machines of the policy
    policy_num_gpus_per_node: int = 1  # devices per machine of the policy
    critic_num_nodes: int = 1  # machines of the critic
    critic_num_gpus_per_node: int = 1  # devices per machine of the critic
    ref_num_nodes: int = 1  # machines of the reference
    ref_num_gpus_per_node: int = 1  # devices per machine of the reference


@dataclass
class FullyAsyncConfig(Section):
    """Generation that runs ahead of training."""

    max_staleness_steps: int = 4  # how many steps ahead generation may run
    num_parallel_generation_workers: int = 768  # prompts that are played at once


@dataclass
class TrainerConfig(Section):
    """The training loop."""

    placement: PlacementConfig = field(default_factory=PlacementConfig)
    sequence_parallel_backend: str = "ulysses"  # how one sequence is shared by GPUs
    strategy: str = "single"  # single: one process, one device
    device: str = "auto"  # auto (cuda where there is one), cpu or cuda
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    fully_async: FullyAsyncConfig = field(default_factory=FullyAsyncConfig)
    # compute activations again in backward: less memory, more time; null: yes, on a GPU where that is faster
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_use_reentrant: bool = False  # torch's older variant of it
    deterministic: bool = False  # same seed, same machine: the same weights, bit for bit; slower
    seed: int = 42  # data order, environment seeds, sampling
    resume_mode: str | None = "latest"  # none (or null), latest, or from_path
    resume_path: str | None = None  # from_path: a global_step_N folder
    log_path: str = "/tmp/skyrl-logs"  # log files of a cluster's workers
    ckpt_path: str = "~/ckpts/"  # resumable checkpoints, a local folder
    max_ckpts_to_keep: int = -1  # keep the newest N; negative keeps all
    ckpt_interval: int = 10  # steps between checkpoints, one more at the end; <= 0 writes none
    hf_save_interval: int = -1  # steps between exports in Hugging Face format, one more at the end; <= 0 writes none
    export_path: str = "~/exports/"  # exports and evaluation results, a local folder
    bf16: bool | None = None  # compute in bfloat16; null: where the device is fast at it
    epochs: int = 1  # passes over the training data
    update_epochs_per_batch: int = 1  # passes over each step's samples
    train_batch_size: int = 1024  # prompts per step
    policy_mini_batch_size: int = 256  # prompts per optimizer step
    critic_mini_batch_size: int = 256  # prompts per optimizer step of the critic
    # memory per pass: tokens, a shared prefix once; changes no gradient; null: 8192, on a GPU what is fastest and fits
    max_tokens_per_microbatch: int | None = None
    micro_train_batch_size_per_gpu: int | None = None  # samples per forward and backward at most; null: no limit
    micro_forward_batch_size_per_gpu: int | None = None  # samples per forward-only pass at most; null: no limit
    update_ref_every_epoch: bool = False  # after an epoch the policy becomes the reference
    use_sample_packing: bool = True  # samples are laid end to end, without padding
    eval_batch_size: int = 1024  # prompts per evaluation batch
    eval_before_train: bool = True  # evaluate at step 0
    eval_interval: int = 5  # steps between evaluations, one more at the end; <= 0 is off
    max_prompt_length: int = 512  # tokens; rows with a longer prompt are dropped and counted
    flash_attn: bool = False  # the flash-attn package; torch's own attention serves without it
    disable_fast_tokenizer: bool = False  # use the slow tokenizer
    project_name: str = "skyrl"  # project in the tracker
    run_name: str = "test_run"  # run in the tracker
    logger: Any = "console"  # console, tensorboard, wandb, mlflow, trackio, swanlab, or a list of them
    profile: bool = False  # write where each step's time went: files in {ckpt_path}/profile that Perfetto opens
    dump_data_batch: bool = False  # pickle every training batch
    dump_eval_results: bool = True  # write evaluation episodes as JSON lines, one file per data source
    rope_scaling: dict[str, Any] | None = None  # RoPE scaling of the policy
    rope_theta: float | None = None  # RoPE base of the policy

    def settle(self) -> None:
        self.ckpt_path, self.export_path = os.path.expanduser(self.ckpt_path), os.path.expanduser(self.export_path)
        if self.resume_path is not None:
            self.resume_path = os.path.expanduser(self.resume_path)

    @property
    def token_budget(self) -> int:
        """Tokens of a pass where no memory plan has chosen."""
        return 8192 if self.max_tokens_per_microbatch is None else self.max_tokens_per_microbatch

    @property
    def loggers(self) -> list[str]:
        return list(self.logger) if isinstance(self.logger, list | tuple) else [self.logger]

    @property
    def reference_is_base(self) -> bool:
        """The reference policy is the model that the policy starts from."""
        policy = self.policy
        return (self.ref.model.path, self.ref.model_config_kwargs) == (policy.model.path, policy.model_config_kwargs)

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("device", ("auto", "cpu", "cuda"))
        yield from self._batch_rules()
        yield from self._resume_rules()
        if self.max_ckpts_to_keep == 0:
            yield self.problem(
                "max_ckpts_to_keep",
                "would delete every checkpoint just written; -1 keeps all, N > 0 the newest N, "
                "trainer.ckpt_interval=-1 writes none",
            )
        if not 0 <= self.seed < 2**63:
            yield self.problem("seed", "must be from 0 to 2^63 - 1")
        for key in ("ckpt_path", "export_path"):
            if "://" in getattr(self, key):
                yield self.problem(key, "is not a local folder; write there, and copy the folder afterwards")
        if self.hf_save_interval > 0 and os.path.realpath(self.export_path) == os.path.realpath(self.ckpt_path):
            yield self.problem(
                "export_path",
                "is trainer.ckpt_path, too: an export would replace a part of the checkpoint of its step; "
                f"set trainer.export_path={os.path.join(self.ckpt_path, 'exports')}",
            )
        if not all(name in LOGGERS for name in self.loggers):
            yield self.problem("logger", "must be one of " + ", ".join(LOGGERS) + ", or a list of them")

    def _batch_rules(self) -> Iterator[Problem]:
        yield from self.at_least(
            1, "epochs", "update_epochs_per_batch", "train_batch_size", "policy_mini_batch_size", "eval_batch_size",
            "max_prompt_length", "max_tokens_per_microbatch", "micro_train_batch_size_per_gpu",
            "micro_forward_batch_size_per_gpu",
        )  # fmt: skip
        train, mini = self.train_batch_size, self.policy_mini_batch_size
        if train < 1 or mini < 1:
            return
        if mini > train:
            yield self.problem(
                "policy_mini_batch_size",
                f"is more than the trainer.train_batch_size={train} prompts of a step; "
                f"set it to {train} or to a divisor of {train}",
                (f"trainer.policy_mini_batch_size={train}",),
            )
        elif train % mini:
            whole, rest = divmod(train, mini)
            yield self.problem(
                "train_batch_size",
                f"prompts cannot be cut into mini batches of trainer.policy_mini_batch_size={mini}: "
                f"{train} = {whole} x {mini} + {rest}; nearest that work: {whole * mini} or {(whole + 1) * mini}",
                (f"trainer.train_batch_size={whole * mini}",),
            )

    def _resume_rules(self) -> Iterator[Problem]:
        yield from self.one_of("resume_mode", (None, "none", "latest", "from_path"))
        path = self.resume_path
        if self.resume_mode == "from_path":
            if not path:
                yield self.problem(
                    "resume_path", "is missing: trainer.resume_mode=from_path needs a global_step_N folder"
                )
            elif "://" in path:
                yield self.problem("resume_path", "is not a local folder; copy the checkpoint here and give its path")
            elif not re.search(r"global_step_\d+$", path.rstrip("/")):
                yield self.problem("resume_path", "must end in global_step_N, the folder of one checkpoint")
        elif path is not None:
            yield self.problem(
                "resume_path", f"is only read with trainer.resume_mode=from_path, not {self.resume_mode}"
            )
