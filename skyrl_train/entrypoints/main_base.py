"""`python -m skyrl_train.entrypoints.main_base key=value ...`: configuration in, a trained policy out."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from skyrl_train.config import (
    SkyRLConfig,
    TrainerConfig,
    config_dir,
    env_config_for,
    is_resolved,
    load_config,
    validate_cfg,
)
from skyrl_train.entrypoints.overrides import check_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h

__all__ = ["BasePPOExp", "config_dir", "main", "validate_cfg"]


class BasePPOExp:
    """Builds the parts of a run. Override a `get_*` to put in a part of your own; one that nobody calls is refused.

    Heavy imports live in the methods, so that a mistyped key is refused before anything heavy is loaded.
    """

    config_class: ClassVar[type[SkyRLConfig]] = SkyRLConfig  # what a DictConfig of Hydra becomes

    def __init__(self, cfg: SkyRLConfig | DictConfig) -> None:
        check_overrides(self, BasePPOExp)
        self.cfg = cfg if is_resolved(cfg) else validate_cfg(cfg, self.config_class)
        self.check_functions()
        self.device, self.compute_dtype = self.get_device()
        self.model_path = self.get_model_path()
        self.tokenizer = self.get_tokenizer()
        self.chat_template = self.get_chat_template()
        self.train_dataset = self.get_train_dataset()
        self.eval_dataset = self.get_eval_dataset()

    def check_functions(self) -> None:
        """Try the user's own functions on a small batch: a wrong shape is found here, not after the first rollout."""
        from skyrl_train.algorithms.trial import check_estimator
        from skyrl_train.callbacks import check_callbacks
        from skyrl_train.learner.objective import Objective

        self.callbacks = check_callbacks(self.get_callbacks())
        check_estimator(self.cfg.trainer.algorithm)
        _ = Objective(self.cfg.trainer.algorithm).style

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
            max_turns=1 if generator.batched else generator.max_turns,
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

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> Any:
        """Override it to play episodes with a GeneratorInterface of your own; None: environments are played as usual.

        `inference_engine_client.generate` samples from the policy.
        """
        return None

    def get_episodes(self, engine: Any) -> Any:
        """What plays the rounds: our collector, or the user's generator behind the same interface."""
        from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
        from skyrl_train.rollout.custom_generator import GeneratorCollector

        client = InferenceEngineClient(
            engine, self.chat_template, max_model_len=engine.max_model_len, seed=self.cfg.trainer.seed
        )
        generator = self.get_generator(self.cfg, self.tokenizer, client)
        if generator is None:
            return self.get_collector(engine)
        needs_logprobs = self.cfg.trainer.algorithm.off_policy_correction.is_on
        return GeneratorCollector(generator, client, needs_logprobs=needs_logprobs)

    def get_trainer(
        self,
        cfg: Any,
        tracker: Any,
        tokenizer: Any,
        train_dataset: Any,
        eval_dataset: Any,
        inference_engine_client: Any,
        generator: Any,
        colocate_pg: Any,
    ) -> Any:
        """A RayPPOTrainer: what happens between the episodes and the batch of a step, and at the events of the run."""
        from skyrl_train.ray_ppo_trainer import RayPPOTrainer

        return RayPPOTrainer(
            cfg=cfg,
            tracker=tracker,
            tokenizer=tokenizer,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            inference_engine_client=inference_engine_client,
            generator=generator,
            colocate_pg=colocate_pg,
        )

    def get_callbacks(self) -> list[Any]:
        """Override it to return TrainingCallbacks (skyrl_train.utils.callbacks)."""
        return []

    def shape_rewards(self, groups: list[Any]) -> Any:
        """Override it to change finished episodes before they become a batch; a coroutine may ask others (a teacher).

        Groups and episodes stay in their order; `Trajectory.plus(reward)` pays an episode more or less.
        """
        return groups

    def get_users_trainer(self, run: Any, episodes: Any) -> Any:
        """What `get_trainer` returned, with the callbacks of `get_callbacks`. RunRefused if it is no RayPPOTrainer."""
        from skyrl_train.ray_ppo_trainer import RayPPOTrainer
        from skyrl_train.run import RunRefused

        try:
            trainer = self.get_trainer(
                cfg=self.cfg,
                tracker=run.tracking,
                tokenizer=self.tokenizer,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                inference_engine_client=getattr(episodes, "client", None),
                generator=getattr(episodes, "generator", None),
                colocate_pg=None,
            )
        except ValueError as error:
            raise RunRefused(str(error)) from error
        if not isinstance(trainer, RayPPOTrainer):
            raise RunRefused(f"get_trainer returned {type(trainer).__name__}; it must return a RayPPOTrainer")
        trainer.callbacks += self.callbacks
        trainer.total_training_steps = self.schedule.num_steps
        return trainer

    def build_trainer(self, run: Any) -> Any:
        from skyrl_train.algorithms.kl import kl_controller
        from skyrl_train.evaluate import Evaluator
        from skyrl_train.prompts import TrainPrompts
        from skyrl_train.trainer import Trainer
        from skyrl_train.weights.in_process import InProcessWeights

        policy = self.get_policy()
        engine = self.get_engine(policy)
        collector = self.get_episodes(engine)
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
            extra_metrics=lambda: {**getattr(collector, "metrics", {}), **self.extra_metrics()},
            users=self.get_users_trainer(run, collector),
            shape_rewards=self.shape_rewards,
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
            trainer = await asyncio.wrap_future(compute.submit(self.build_trainer, run))
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
    try:
        cfg = load_config(sys.argv[1:] if arguments is None else arguments, root)
    except ValueError as error:
        return _refused(error)
    from skyrl_train.run import RunRefused, log_to

    log_to(sys.stderr)
    try:
        exp = experiment(cfg)
    except (ValueError, OSError) as error:  # of the model or the data
        return _refused(error)
    try:
        result = exp.run()
        if inspect.iscoroutine(result):
            asyncio.run(result)
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
    print(f"refused: {error}", file=sys.stderr)
    return 2


_MAKERS_OF_ENGINES = (
    "create_ray_wrapped_inference_engines_from_config",
    "create_remote_inference_engines_from_config",
)


def __getattr__(name: str) -> Any:
    """`skyrl_entrypoint`, SkyRL's Ray task, made when it is asked for: only who uses Ray waits for its import.

    SkyRL's makers of engines can be imported, as its examples do, and refuse to be called.
    """
    if name == "skyrl_entrypoint":
        from skyrl_train.cluster.start import skyrl_entrypoint

        return skyrl_entrypoint(BasePPOExp)
    if name in _MAKERS_OF_ENGINES:
        return partial(_refuse_maker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse_maker(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"{name} makes SkyRL's engines, which are not here; override get_engine(policy) instead")


if __name__ == "__main__":
    sys.exit(main())
