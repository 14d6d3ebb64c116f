"""`python -m skyrl_train.entrypoints.main_base key=value ...`: configuration in, a trained policy out."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from skyrl_train.config import SkyRLConfig, TrainerConfig, config_dir, env_config_for, load_config, validate_cfg
from skyrl_train.records.visible import make_errors_visible, visible

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h

__all__ = ["BasePPOExp", "config_dir", "main", "validate_cfg"]


class BasePPOExp:
    """Builds the parts of a run. Override a `get_*` to put in a part of your own.

    Heavy imports live in the methods, so that a mistyped key is refused before anything heavy is loaded.
    """

    def __init__(self, cfg: SkyRLConfig) -> None:
        self.cfg = cfg
        self.device, self.compute_dtype = self.get_device()
        self.model_path = self.get_model_path()
        self.tokenizer = self.get_tokenizer()
        self.chat_template = self.get_chat_template()
        self.train_dataset = self.get_train_dataset()
        self.eval_dataset = self.get_eval_dataset()

    def get_model_path(self) -> str:
        """A folder on this machine, or a hub name that transformers can load."""
        from skyrl_train.pretrained import resolve_model

        return str(resolve_model(self.cfg.trainer.policy.model.path))

    def get_tokenizer(self) -> Any:
        from skyrl_train.learner.model import load_tokenizer

        return load_tokenizer(self.model_path)

    def get_chat_template(self) -> Any:
        from skyrl_train.rollout.chat import ChatTemplate, read_chat_template

        generator = self.cfg.generator
        return ChatTemplate(
            self.tokenizer,
            one_message=not generator.use_conversation_multi_turn,
            template=read_chat_template(generator.chat_template.source, generator.chat_template.name_or_path),
            template_kwargs=generator.chat_template_kwargs,
            append_eos_after_stop_string=generator.append_eos_token_after_stop_str_in_multi_turn,
        )

    def get_train_dataset(self) -> Any:
        return self._dataset(self.cfg.data.train_data)

    def get_eval_dataset(self) -> Any:
        """None without validation data or with evaluation switched off."""
        if self.cfg.trainer.eval_interval <= 0 or not self.cfg.data.val_data:
            return None
        return self._dataset(self.cfg.data.val_data)

    def get_device(self) -> tuple[Any, Any]:
        """Device and compute dtype; the reason for the choice is printed."""
        from loguru import logger

        from skyrl_train.learner.model import choose_compute_dtype, choose_device

        device = choose_device(self.cfg.trainer.device)
        dtype, reason = choose_compute_dtype(device, self.cfg.trainer.bf16)
        logger.info(reason)
        return device, dtype

    def get_policy(self) -> Any:
        from skyrl_train.learner.model import load_policy

        trainer = self.cfg.trainer
        if self.device.type == "cpu":
            keep_freed_memory()
        policy = load_policy(
            self.model_path,
            device=self.device,
            compute_dtype=self.compute_dtype,
            model_config_kwargs=trainer.policy.model_config_kwargs,
            gradient_checkpointing=trainer.gradient_checkpointing,
        )
        if trainer.policy.model.lora.rank > 0:
            self.add_adapters(policy)
        return policy

    def add_adapters(self, policy: Any) -> None:
        from loguru import logger

        from skyrl_train.learner.lora import NoSuchModules, add_adapters
        from skyrl_train.run import RunRefused

        trainer = self.cfg.trainer
        try:
            add_adapters(policy, trainer.policy.model.lora, seed=trainer.seed)
        except NoSuchModules as error:
            raise RunRefused(f"trainer.policy.model.lora: {error}") from error
        trained = sum(weight.numel() for weight in policy.weights.values() if weight.requires_grad)
        logger.info(f"training adapters of {trained:,} weights; the model itself stays as it is")

    def get_reference(self, policy: Any) -> Any:
        """A frozen policy to measure the KL from, or None where no KL term has a weight."""
        from skyrl_train.learner.learner import needs_reference
        from skyrl_train.learner.lora import BaseUnderAdapters
        from skyrl_train.learner.model import load_policy
        from skyrl_train.pretrained import resolve_model

        trainer = self.cfg.trainer
        if not needs_reference(trainer.algorithm):
            return None
        if trainer.policy.model.lora.rank > 0 and trainer.reference_is_base:
            return BaseUnderAdapters.of(policy)
        same = trainer.ref.model.path == trainer.policy.model.path
        path = self.model_path if same else str(resolve_model(trainer.ref.model.path))
        reference = load_policy(
            path,
            device=policy.device,
            compute_dtype=policy.compute_dtype,
            model_config_kwargs=trainer.ref.model_config_kwargs,
        )
        reference.module.requires_grad_(False)
        return reference

    def get_learner(self, policy: Any) -> Any:
        from skyrl_train.learner.learner import Learner

        return Learner(
            policy,
            self.cfg.trainer,
            num_training_steps=self.schedule.num_steps,
            temperature=self.cfg.generator.sampling_params.temperature,
            reference=self.get_reference(policy),
        )

    def get_engine(self, policy: Any) -> Any:
        from skyrl_train.engine.torch.engine import TorchEngine

        generator = self.cfg.generator
        return TorchEngine(
            policy,
            self.tokenizer,
            max_num_seqs=generator.max_num_seqs,
            max_num_batched_tokens=generator.max_num_batched_tokens,
            deterministic=self.cfg.trainer.deterministic,
        )

    def get_collector(self, engine: Any) -> Any:
        from skyrl_train.rollout.collector import Collector
        from skyrl_train.rollout.episode import EpisodeLimits

        generator, environment = self.cfg.generator, self.cfg.environment
        limits = EpisodeLimits(
            max_turns=generator.max_turns,
            max_input_length=generator.max_input_length,
            max_context=engine.max_model_len,
            step_timeout_s=generator.step_timeout_s,
            episode_timeout_s=generator.episode_timeout_s,
        )
        return Collector(
            engine,
            self.chat_template,
            limits,
            env_configs=lambda env_id: env_config_for(environment, env_id),
            max_env_workers=environment.skyrl_gym.max_env_workers,
            max_retries=generator.max_env_retries,
            seed=self.cfg.trainer.seed,
            deterministic=self.cfg.trainer.deterministic,
        )

    def get_trainer(self, run: Any) -> Any:
        from skyrl_train.algorithms.kl import kl_controller
        from skyrl_train.evaluate import Evaluator
        from skyrl_train.prompts import TrainPrompts
        from skyrl_train.trainer import Trainer
        from skyrl_train.weights.in_process import InProcessWeights

        policy = self.get_policy()
        engine = self.get_engine(policy)
        collector = self.get_collector(engine)
        evaluator = None
        if self.eval_dataset is not None:
            evaluator = Evaluator(self.cfg, self.eval_dataset, collector, run, self.tokenizer.decode)
        return Trainer(
            config=self.cfg,
            tokenizer=self.tokenizer,
            prompts=TrainPrompts(self.train_dataset, self.schedule),
            evaluator=evaluator,
            collector=collector,
            engine=engine,
            learner=self.get_learner(policy),
            weights=InProcessWeights(),
            run=run,
            kl_controller=kl_controller(self.cfg.trainer.algorithm),
            extra_metrics=self.extra_metrics,
        )

    @property
    def schedule(self) -> Any:
        from skyrl_train.prompts import PromptSchedule

        trainer = self.cfg.trainer
        return PromptSchedule(len(self.train_dataset), trainer.train_batch_size, trainer.epochs, trainer.seed)

    def extra_metrics(self) -> dict[str, float]:
        """Override it to log more with every step."""
        return {}

    async def close(self) -> None:
        """Override it to close what the experiment has opened beside its trainer; runs on every path."""

    def run(self) -> Any:
        """Train from wherever the run stands. Returns its Summary."""
        import torch

        from skyrl_train.run import Run, run_info

        total_steps = self.schedule.num_steps
        environment = ", ".join(sorted({prompt.data_source for prompt in self.train_dataset}))
        torch.use_deterministic_algorithms(self.cfg.trainer.deterministic)
        device = f"{self.device}, {str(self.compute_dtype).removeprefix('torch.')}"
        info = run_info(self.cfg, Path(self.model_path).name, environment, device, total_steps)
        with Run.open(self.cfg, self.tokenizer, info) as run:
            if run.start.step >= total_steps:
                run.progress.print(
                    f"this run is complete: {run.start.step} of {total_steps} steps. To go on, raise trainer.epochs; "
                    "to start afresh, set trainer.resume_mode=none or another trainer.ckpt_path"
                )
            else:
                asyncio.run(self._train(run))
            return run.finish()

    async def _train(self, run: Any) -> None:
        """SIGTERM ends a run as Ctrl-C does: the task is cancelled, and everything it opened is closed."""
        with suppress(NotImplementedError):  # where the platform's event loop has no signal handlers
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # ty: ignore
        from skyrl_train import compute

        try:
            trainer = await asyncio.wrap_future(compute.submit(self.get_trainer, run))
            await trainer.train()
        finally:
            await self.close()

    def _dataset(self, sources: Sequence[str]) -> Any:
        from skyrl_train.prompts import PromptDataset

        trainer = self.cfg.trainer
        return PromptDataset(
            list(sources),
            self.tokenizer,
            trainer.max_prompt_length,
            self.cfg.environment.env_class,
            self.chat_template.template_kwargs,
        )


def main(
    arguments: Sequence[str] | None = None,
    experiment: type[BasePPOExp] = BasePPOExp,
    root: type[SkyRLConfig] = SkyRLConfig,
) -> int:
    """Exit status: 0 done, 2 refused before training, 130 interrupted. What breaks otherwise shows its traceback."""
    make_errors_visible()
    try:
        cfg = load_config(sys.argv[1:] if arguments is None else arguments, root)
    except ValueError as error:
        return _refused(error)
    from skyrl_train.run import RunRefused

    try:
        exp = experiment(cfg)
    except (ValueError, OSError) as error:  # of the model or the data
        return _refused(error)
    try:
        exp.run()
    except RunRefused as error:
        return _refused(error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"interrupted; {_how_to_go_on(cfg.trainer)}", file=sys.stderr)
        return 130
    return 0


def _how_to_go_on(trainer: TrainerConfig) -> str:
    from skyrl_train.records.run_folder import checkpoint_steps

    steps = checkpoint_steps(Path(trainer.ckpt_path))
    if steps:
        return f"the same command goes on after step {steps[-1]}, the newest checkpoint in {trainer.ckpt_path}"
    return f"no checkpoint was due yet (trainer.ckpt_interval={trainer.ckpt_interval}): the same command begins again"


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks instead of giving them back: fresh pages cost an update on a CPU 15% of its time.

    One arena for all threads: with one each, what the engine, the learner and autograd free stays with the thread that
    freed it, and a run held 11 GB that now holds 8. Without effect where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _refused(error: Exception) -> int:
    print(visible(f"refused: {error}"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
