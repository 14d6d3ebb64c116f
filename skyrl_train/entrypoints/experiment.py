"""An experiment: all its parts together, the user's hooks between them, and the run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loguru import logger

from skyrl_train.config import SkyRLConfig, is_resolved, validate_cfg
from skyrl_train.entrypoints.overrides import NEVER_CALLED, check_overrides
from skyrl_train.entrypoints.process import cancel_on_signals
from skyrl_train.entrypoints.rollout_parts import RolloutParts
from skyrl_train.users_functions import WrongFunction, checked_part

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.callbacks import TrainingCallback
    from skyrl_train.cluster.parts import ComputingParts
    from skyrl_train.generators.base import GeneratorInterface
    from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
    from skyrl_train.learner.base import Learner
    from skyrl_train.policy.model import Policy
    from skyrl_train.prompts import PromptRows
    from skyrl_train.ray_ppo_trainer import RayPPOTrainer
    from skyrl_train.rollout.round import RoundPlayer
    from skyrl_train.run.records.summary import Summary
    from skyrl_train.run.run import Run
    from skyrl_train.run.tracking import Tracking
    from skyrl_train.trainer import Trainer
    from skyrl_train.types import Group


class BasePPOExp(RolloutParts):
    """Builds the parts of a run. Override a `get_*` to put in a part of your own; one that nobody calls is refused.

    Heavy imports live in the methods, so that a mistyped key is refused before anything heavy is loaded.
    """

    config_class: ClassVar[type[SkyRLConfig]] = SkyRLConfig  # what a DictConfig of Hydra becomes
    parts: ComputingParts | None = None  # those in other processes, while they live

    def __init__(self, cfg: SkyRLConfig | DictConfig) -> None:
        check_overrides(self, BasePPOExp)
        self.cfg = cfg if is_resolved(cfg) else validate_cfg(cfg, self.config_class)
        self.check_functions()
        self.device, self.compute_dtype = self.get_device()
        self.placement = self.get_placement()
        self.model_path = self.get_model_path()
        self.num_embeddings = self.get_num_embeddings()
        self.critic_path = self.get_critic_path()
        self.memory = self.get_memory_plan()
        self.tokenizer = self.get_tokenizer()
        if not hasattr(self.tokenizer, "apply_chat_template"):
            raise ValueError(f"get_tokenizer returned {self.tokenizer!r}; it must return a tokenizer of transformers")
        self.check_teacher()
        self.chat_template = self.get_chat_template()
        self.fit_tokenizer()
        self.train_dataset = self.as_prompts(self.get_train_dataset(), "get_train_dataset")
        self.eval_dataset = self.as_prompts(self.get_eval_dataset(), "get_eval_dataset")
        self.rewards = self.get_rewards()
        self.check_conversations()
        self.conversations = self.get_conversations()
        self.schedule = None if self.train_dataset is None else self.get_schedule()

    if not TYPE_CHECKING:  # a type checker should go on naming what is not there

        def __getattr__(self, name: str) -> Any:
            """Say of a method of SkyRL's that is not here what to do instead of calling it."""
            instead = f": {NEVER_CALLED[name]}" if name in NEVER_CALLED else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    def check_functions(self) -> None:
        """Try the user's own functions on a small batch: a wrong shape is found here, not after the first rollout."""
        from skyrl_train.algorithms.trial import check_estimator
        from skyrl_train.callbacks import check_callbacks
        from skyrl_train.learner.objective import Objective

        self.callbacks = check_callbacks(self.get_callbacks())
        check_estimator(self.cfg.trainer.algorithm)
        _ = Objective(self.cfg.trainer.algorithm).style

    def get_learner(self, policy: Policy) -> Learner:
        """Return the learner of this process: the only one, or one of the ranks that share the policy."""
        from skyrl_train.learner.learner import TorchLearner

        assert self.schedule is not None
        if self.cfg.trainer.strategy == "single":
            make = TorchLearner
        else:
            from skyrl_train.learner.fsdp import sharded_learner

            make = partial(sharded_learner, offload=self.cfg.trainer.policy.fsdp_config.cpu_offload)
        return make(
            policy,
            self.trainer_section,
            num_training_steps=self.schedule.num_steps,
            temperature=self.cfg.generator.sampling_params.temperature,
            reference=self.get_reference(policy),
            critic=self.get_critic(policy),
        )

    def get_trainer(
        self,
        cfg: SkyRLConfig,
        tracker: Tracking,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: PromptRows,
        eval_dataset: PromptRows | None,
        inference_engine_client: InferenceEngineClient | None,
        generator: GeneratorInterface | None,
        colocate_pg: None,
    ) -> RayPPOTrainer:
        """Return a RayPPOTrainer: what happens between episodes and batch of a step, and at the events of the run."""
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

    def get_callbacks(self) -> list[TrainingCallback]:
        """Override it to return TrainingCallbacks (skyrl_train.utils.callbacks)."""
        return []

    def shape_rewards(self, groups: list[Group]) -> Any:
        """Override it to change finished episodes before they become a batch; a coroutine may ask others (a teacher).

        Groups and episodes stay in their order; `Trajectory.plus(reward)` pays an episode more or less.
        """
        return groups

    def get_users_trainer(self, run: Run, episodes: RoundPlayer) -> RayPPOTrainer:
        """Return the trainer of `get_trainer`, with the callbacks of `get_callbacks`. RunRefused for what is none."""
        from skyrl_train.generators.custom_generator import GeneratorCollector
        from skyrl_train.generators.users_tokenizer import users_tokenizer
        from skyrl_train.ray_ppo_trainer import RayPPOTrainer
        from skyrl_train.run.run import RunRefused

        assert self.train_dataset is not None
        assert self.schedule is not None
        users = episodes if isinstance(episodes, GeneratorCollector) else None
        try:
            trainer = self.get_trainer(
                cfg=self.cfg,
                tracker=run.tracking,
                tokenizer=users_tokenizer(self.tokenizer),
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                inference_engine_client=users.client if users else None,
                generator=users.generator if users else None,
                colocate_pg=None,
            )
        except ValueError as error:
            raise RunRefused(str(error)) from error
        if not isinstance(trainer, RayPPOTrainer):
            raise RunRefused(f"get_trainer returned {type(trainer).__name__}; it must return a RayPPOTrainer")
        checked_part(
            trainer, "get_trainer, whose __init__ does not call super().__init__(...),", "callbacks", "control"
        )
        trainer.callbacks += self.callbacks
        trainer.total_training_steps = self.num_steps
        return trainer

    def get_parts(self) -> ComputingParts:
        """Return learner, engine and the way between them, all in this process."""
        from skyrl_train.cluster.parts import ComputingParts
        from skyrl_train.weights.in_process import InProcessWeights

        policy = checked_part(self.get_policy(), "get_policy", "module", "weights")
        learner = checked_part(self.get_learner(policy), "get_learner", "add_logprobs", "update")
        engine = checked_part(self.get_engine(policy), "get_engine", "generate", "pause", "weights_changed", "resume")
        return ComputingParts(learner, engine, InProcessWeights())

    def build_trainer(self, run: Run) -> Trainer:
        from skyrl_train.algorithms.kl import kl_controller
        from skyrl_train.callbacks import numbers_of
        from skyrl_train.evaluate import Evaluator
        from skyrl_train.prompts import TrainPrompts
        from skyrl_train.trainer import Trainer

        assert self.train_dataset is not None
        assert self.schedule is not None
        parts = self.parts or self.get_parts()
        collector = self.get_episodes(parts.engine)
        evaluator = None
        if self.eval_dataset is not None:
            evaluator = Evaluator(self.cfg, self.eval_dataset, collector, run, self.decode)
        return Trainer(
            config=self.cfg,
            tokenizer=self.tokenizer,
            prompts=TrainPrompts(self.train_dataset, self.schedule),
            evaluator=evaluator,
            collector=collector,
            engine=parts.engine,
            learner=parts.learner,
            weights=parts.weights,
            run=run,
            kl_controller=kl_controller(self.cfg.trainer.algorithm),
            extra_metrics=lambda: {
                **collector.metrics,
                **self.judge_metrics(),
                **numbers_of(self.extra_metrics(), "what extra_metrics() returns"),
            },
            conversations=self.conversations,
            users=self.get_users_trainer(run, collector),
            shape_rewards=self.shape_rewards,
        )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run: those that imitate, and those of RL."""
        assert self.schedule is not None
        return self.schedule.num_steps + (self.conversations.num_steps if self.conversations else 0)

    def judge_metrics(self) -> dict[str, float]:
        """Return how often judges were asked so far, and how often in vain."""
        return self.rewards.metrics if self.rewards else {}

    def extra_metrics(self) -> dict[str, float]:
        """Override it to log more with every step."""
        return {}

    async def close(self) -> None:
        """Override it to close what the experiment has opened beside its trainer; runs on every path."""

    async def closed(self) -> None:
        """Close what `close` closes, whether it is a coroutine or not."""
        closing: Any = self.close()
        if inspect.isawaitable(closing):
            await closing

    def run(self) -> Summary | Any:
        """Train from wherever the run stands, and return its Summary; a subclass's may be a coroutine of anything."""
        import torch

        from skyrl_train.run.run import Run, RunRefused, environment_of, run_info

        if self.train_dataset is None:
            raise RunRefused("get_train_dataset returned None: there is nothing to train on; it must return a data set")
        total_steps = self.num_steps
        environment = environment_of(self.train_dataset)
        torch.use_deterministic_algorithms(self.cfg.trainer.deterministic)
        device = f"{self.device}, {str(self.compute_dtype).removeprefix('torch.')}{self.placement.counted()}"
        info = run_info(self.cfg, Path(self.model_path).name, environment, device, total_steps)
        with Run.open(self.cfg, self.tokenizer, info, self.get_contents()) as run:
            if run.start.step >= total_steps:
                run.progress.print(
                    f"this run is complete: {run.start.step} of {total_steps} steps. To go on, raise trainer.epochs; "
                    "to start afresh, set trainer.resume_mode=none or another trainer.ckpt_path"
                )
            else:
                asyncio.run(self._train(run))
            self.keep_model(run)
            return run.finish()

    def keep_model(self, run: Run) -> None:
        """Write the trained model as a Hugging Face folder into the run's folder, from the newest checkpoint."""
        from skyrl_train.run.model_folder import export_at_the_end

        if self.cfg.trainer.save_model:
            logger.info(f"model: {export_at_the_end(run.folder)}")

    async def _train(self, run: Run) -> None:
        from skyrl_train import compute
        from skyrl_train.run.run import RunRefused

        cancel_on_signals()
        try:
            async with self.other_processes():
                try:
                    trainer = await asyncio.wrap_future(compute.submit(self.build_trainer, run))
                except WrongFunction as error:
                    raise RunRefused(str(error)) from error
                await trainer.train()
        finally:
            await self.closed()

    @asynccontextmanager
    async def other_processes(self) -> AsyncGenerator[None]:
        """Start learner ranks and engines in processes of their own, where the placement asks for them.

        They end with the block; when this process is killed, too.
        """
        if self.placement.in_process:
            yield
            return
        from skyrl_train.cluster.launch import cluster_of

        async with cluster_of(self.for_other_processes(), self.placement) as self.parts:
            cancel_on_signals()  # again: Ray has put a handler of its own in front, which aborts this process
            yield
