"""Settings of the training loop: prompts per step, duration, device, checkpoints and reports."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.critic import CriticConfig
from skyrl_train.config.models import PolicyConfig, RefConfig
from skyrl_train.config.placement import PlacementConfig
from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section
from skyrl_train.config.sft import SFTConfig

STRATEGIES = ("single", "fsdp2", "fsdp")
LOGGERS = ("console", "tensorboard", "wandb", "mlflow", "trackio", "swanlab")


@dataclass
class TrainerConfig(Section, at="trainer"):
    """The training loop."""

    device: str = "auto"  # auto (cuda where there is one), cpu or cuda
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    strategy: str = "single"  # single: one learner holds the whole policy; fsdp2: ranks share it; fsdp: the same
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    # compute activations again in backward: less memory, more time; null: yes, on a GPU where that is faster
    gradient_checkpointing: bool | None = None
    deterministic: bool = False  # same seed, same machine: the same weights, bit for bit; slower
    seed: int = 42  # data order, environment seeds, sampling
    resume_mode: str | None = "latest"  # none (or null), latest, or from_path
    resume_path: str | None = None  # from_path: a global_step_N folder
    ckpt_path: str = "~/ckpts/"  # resumable checkpoints, a local folder
    max_ckpts_to_keep: int = -1  # keep the newest N; negative keeps all
    ckpt_interval: int = 10  # steps between checkpoints, one more at the end; <= 0 writes none
    hf_save_interval: int = -1  # steps between exports in Hugging Face format, one more at the end; <= 0 writes none
    save_model: bool = True  # at the end, write the model as a Hugging Face folder, in bfloat16, to ckpt_path/model
    export_path: str = "~/exports/"  # exports and evaluation results, a local folder
    bf16: bool | None = None  # compute in bfloat16; null: where the device is fast at it
    epochs: int = 1  # passes over the training data
    update_epochs_per_batch: int = 1  # passes over each step's samples
    train_batch_size: int = 1024  # prompts per step
    policy_mini_batch_size: int = 256  # prompts per optimizer step
    critic_mini_batch_size: int = 256  # prompts per optimizer step of the critic; the whole step, if it has fewer
    # memory per pass: tokens, a shared prefix once; changes no gradient; null: 8192, on a GPU what is fastest and fits
    max_tokens_per_microbatch: int | None = None
    micro_train_batch_size_per_gpu: int | None = None  # samples per forward and backward at most; null: no limit
    micro_forward_batch_size_per_gpu: int | None = None  # samples per forward-only pass at most; null: no limit
    update_ref_every_epoch: bool = False  # after an epoch the policy becomes the reference
    eval_batch_size: int = 1024  # prompts per evaluation batch
    eval_before_train: bool = True  # evaluate at step 0
    eval_interval: int = 5  # steps between evaluations, one more at the end; <= 0 is off
    max_prompt_length: int = 512  # tokens; rows with a longer prompt are dropped and counted
    project_name: str = "skyrl"  # project in the tracker
    run_name: str = ""  # run in the tracker; empty: environment, model and date
    logger: Any = "console"  # console, tensorboard, wandb, mlflow, trackio, swanlab, or a list of them
    profile: bool = False  # write where each step's time went: files in {ckpt_path}/profile that Perfetto opens
    dump_data_batch: bool = False  # write every training batch as tensors (safetensors) into export_path/dumped_data
    dump_eval_results: bool = True  # write evaluation episodes as JSON lines, one file per data source

    def settle(self) -> None:
        self.ckpt_path, self.export_path = os.path.expanduser(self.ckpt_path), os.path.expanduser(self.export_path)
        if self.resume_path is not None:
            self.resume_path = os.path.expanduser(self.resume_path)

    @property
    def token_budget(self) -> int:
        """Tokens of a pass if no memory plan has set them."""
        return 8192 if self.max_tokens_per_microbatch is None else self.max_tokens_per_microbatch

    @property
    def loggers(self) -> list[str]:
        return list(self.logger) if isinstance(self.logger, list | tuple) else [self.logger]

    @property
    def reference_is_base(self) -> bool:
        """Return whether the reference policy is the model that the policy starts from."""
        policy = self.policy
        return (self.ref.model.path, self.ref.model_config_kwargs) == (policy.model.path, policy.model_config_kwargs)

    @property
    def reference_moves(self) -> bool:
        """Return whether the reference does not stay as it was loaded: it follows an epoch, or the imitation."""
        return self.update_ref_every_epoch or (self.sft.is_on and self.reference_is_base)

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("device", ("auto", "cpu", "cuda"))
        yield from self._strategy_rules()
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

    def _strategy_rules(self) -> Iterator[Problem]:
        ranks = self.placement.num_ranks
        if self.strategy == "megatron":
            yield self.problem(
                "strategy",
                "is for Megatron, which this project does not have; use trainer.strategy=fsdp2",
                ("trainer.strategy=fsdp2",),
            )
            return
        yield from self.one_of("strategy", STRATEGIES)
        if self.strategy == "single" and ranks > 1:
            yield self.problem(
                "strategy",
                f"is one learner, but the placement asks for {ranks} ranks; use trainer.strategy=fsdp2, or "
                "trainer.placement with one machine and one device",
                ("trainer.strategy=fsdp2",),
            )

    def _batch_rules(self) -> Iterator[Problem]:
        yield from self.at_least(
            1, "epochs", "update_epochs_per_batch", "train_batch_size", "policy_mini_batch_size",
            "critic_mini_batch_size", "eval_batch_size", "max_prompt_length", "max_tokens_per_microbatch",
            "micro_train_batch_size_per_gpu", "micro_forward_batch_size_per_gpu",
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
                says = "is missing: trainer.resume_mode=from_path needs a global_step_N folder"
                yield self.problem("resume_path", says, drops=("trainer.resume_mode",))
            elif "://" in path:
                yield self.problem("resume_path", "is not a local folder; copy the checkpoint here and give its path")
            elif not re.search(r"global_step_\d+$", path.rstrip("/")):
                yield self.problem("resume_path", "must end in global_step_N, the folder of one checkpoint")
        elif path is not None:
            yield self.problem(
                "resume_path", f"is only read with trainer.resume_mode=from_path, not {self.resume_mode}"
            )
