"""`python -m skyrl_train.entrypoints.main_base key=value ...`: configuration in, a trained policy out."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import inspect
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
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
from skyrl_train.console import lasting_output
from skyrl_train.entrypoints.overrides import check_overrides
from skyrl_train.run.records.visible import make_errors_visible, visible

if TYPE_CHECKING:
    from omegaconf import DictConfig

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a disk says that takes no more
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
        self.num_embeddings = self.get_num_embeddings()
        self.memory = self.get_memory_plan()
        self.tokenizer = self.get_tokenizer()
        self.chat_template = self.get_chat_template()
        self.fit_tokenizer()
        self.train_dataset = self.get_train_dataset()
        self.eval_dataset = self.get_eval_dataset()
        self.check_conversations()
        self.schedule: Any = None if self.train_dataset is None else self.get_schedule()

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
        from skyrl_train.policy.pretrained import resolve_model

        return str(resolve_model(self.cfg.trainer.policy.model.path))

    def get_num_embeddings(self) -> int:
        """How many tokens the model knows, by its configuration."""
        from skyrl_train.policy.model_files import load_config

        config = load_config(self.model_path, self.cfg.trainer.policy.model_config_kwargs)
        return config.get_text_config().vocab_size

    def get_tokenizer(self) -> Any:
        from skyrl_train.policy.model import load_tokenizer

        return load_tokenizer(self.model_path)

    def get_chat_template(self) -> Any:
        from jinja2 import TemplateError

        from skyrl_train.policy.end_of_turn import end_of_turn_ids, read_generation_config
        from skyrl_train.rollout.chat import ChatTemplate, read_chat_template

        generator = self.cfg.generator
        config_kwargs = self.cfg.trainer.policy.model_config_kwargs or {}
        generation_config = read_generation_config(self.model_path, **config_kwargs)
        try:
            return ChatTemplate(
                self.tokenizer,
                one_message=not generator.use_conversation_multi_turn,
                template=read_chat_template(generator.chat_template.source, generator.chat_template.name_or_path),
                template_kwargs=generator.chat_template_kwargs,
                append_eos_after_stop_string=generator.append_eos_token_after_stop_str_in_multi_turn,
                end_ids=end_of_turn_ids(generation_config, self.tokenizer),
                grows=generator.max_turns != 1 and not generator.batched,
                keep_thinking=generator.chat_template.keep_thinking,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template cannot print a question and its answer: {error}") from error

    def check_conversations(self) -> None:
        """Refuse a chat template that does not print the data set's kinds of prompts, or what follows them, exactly."""
        kinds = set()
        for prompt in [*(self.train_dataset or []), *(self.eval_dataset or [])]:
            max_turns = 1 if self.cfg.generator.batched else self.cfg.generator.max_turns
            if (own_limit := prompt.env_extras.get("max_turns")) is not None:
                max_turns = int(own_limit)
            kinds.add((tuple(message["role"] for message in prompt.messages), max_turns != 1))
        for roles, grows in sorted(kinds):
            self.chat_template.check(roles, grows=grows)

    def fit_tokenizer(self) -> None:
        """Refuse a tokenizer that is not the model's, before anything large is loaded."""
        from skyrl_train.policy.model_files import fit_tokenizer

        prompt = self.chat_template.start([{"role": "user", "content": "a"}])
        fit_tokenizer(self.tokenizer, self.num_embeddings, prompt.ids)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that an episode can become, unless the model's context ends before."""
        generator = self.cfg.generator
        sampled = generator.sampling_params, generator.eval_sampling_params
        return generator.max_input_length + max(params.max_generate_length for params in sampled)

    def get_train_dataset(self) -> Any:
        return self._dataset(self.cfg.data.train_data)

    def get_eval_dataset(self) -> Any:
        """None without validation data or with evaluation switched off."""
        if self.cfg.trainer.eval_interval <= 0 or not self.cfg.data.val_data:
            return None
        return self._dataset(self.cfg.data.val_data)

    def get_contents(self) -> dict[str, dict[str, str]]:
        """What the files that the settings name hold (contents.py): a checkpoint goes on only with the same."""
        from skyrl_train.learner.learner import needs_reference
        from skyrl_train.policy.pretrained import resolve_model
        from skyrl_train.run.contents import model_contents, prompt_contents, template_contents

        trainer, template = self.cfg.trainer, self.chat_template.template_kwargs.get("chat_template")
        policy = model_contents(self.model_path)
        contents = {
            "trainer.policy.model.path": policy,
            "generator.chat_template.name_or_path": template_contents(template or self.tokenizer.chat_template),
        }
        for key, prompts in (("data.train_data", self.train_dataset), ("data.val_data", self.eval_dataset)):
            if prompts is not None:
                contents[key] = prompt_contents(prompts)
        if trainer.ref.model.path == trainer.policy.model.path:
            contents["trainer.ref.model.path"] = policy
        elif needs_reference(trainer.algorithm):
            contents["trainer.ref.model.path"] = model_contents(resolve_model(trainer.ref.model.path))
        return contents

    def get_device(self) -> tuple[Any, Any]:
        """Device and compute dtype; the reason for the choice is printed."""
        from loguru import logger

        from skyrl_train.policy.model import choose_compute_dtype, choose_device

        device = choose_device(self.cfg.trainer.device)
        dtype, reason = choose_compute_dtype(device, self.cfg.trainer.bf16)
        logger.info(reason)
        return device, dtype

    def get_memory_plan(self) -> Any:
        """How a GPU's memory is used, decided before anything large is loaded; None on a CPU. Raises ValueError."""
        if self.device.type != "cuda":
            return None
        from skyrl_train.policy.lora import NoSuchModules
        from skyrl_train.policy.model_memory import meta_module, plan_of_run

        trainer, generator = self.cfg.trainer, self.cfg.generator
        module = meta_module(self.model_path, self.compute_dtype, trainer.policy.model_config_kwargs)
        try:
            return plan_of_run(module, trainer, generator, self.device, reference_weights=self.num_reference_weights())
        except NoSuchModules as error:
            raise ValueError(f"trainer.policy.model.lora: {error}") from error

    def num_reference_weights(self) -> int:
        """Of a reference policy that must be loaded beside the policy."""
        from skyrl_train.learner.learner import needs_reference
        from skyrl_train.policy.model_memory import meta_module, num_weights

        trainer = self.cfg.trainer
        is_under_adapters = trainer.policy.model.lora.rank > 0 and trainer.reference_is_base
        if is_under_adapters or not needs_reference(trainer.algorithm):
            return 0
        return num_weights(meta_module(self.get_reference_path(), self.compute_dtype, trainer.ref.model_config_kwargs))

    @property
    def trainer_section(self) -> TrainerConfig:
        """The trainer's section, with what it left to the memory plan."""
        trainer, memory = self.cfg.trainer, self.memory
        if memory is None:  # a CPU
            is_on = trainer.gradient_checkpointing is not False
            return replace(trainer, max_tokens_per_microbatch=trainer.token_budget, gradient_checkpointing=is_on)
        return replace(
            trainer,
            max_tokens_per_microbatch=memory.token_budget,
            gradient_checkpointing=memory.gradient_checkpointing,
        )

    def get_policy(self) -> Any:
        from skyrl_train.policy.model import load_policy

        trainer = self.trainer_section
        if self.device.type == "cpu":
            keep_freed_memory()
        policy = load_policy(
            self.model_path,
            device=self.device,
            compute_dtype=self.compute_dtype,
            model_config_kwargs=trainer.policy.model_config_kwargs,
            gradient_checkpointing=bool(trainer.gradient_checkpointing),
            max_length=self.max_length,
        )
        if trainer.policy.model.lora.rank > 0:
            self.add_adapters(policy)
        return policy

    def add_adapters(self, policy: Any) -> None:
        from loguru import logger

        from skyrl_train.policy.lora import NoSuchModules, add_adapters
        from skyrl_train.run.run import RunRefused

        trainer = self.cfg.trainer
        try:
            add_adapters(policy, trainer.policy.model.lora, seed=trainer.seed)
        except NoSuchModules as error:
            raise RunRefused(f"trainer.policy.model.lora: {error}") from error
        trained = sum(weight.numel() for weight in policy.weights.values() if weight.requires_grad)
        logger.info(f"training adapters of {trained:,} weights; the model itself stays as it is")

    def get_reference_path(self) -> str:
        """A folder on this machine, fetched if need be; the policy's own where they are the same."""
        from skyrl_train.policy.pretrained import resolve_model

        path = self.cfg.trainer.ref.model.path
        return self.model_path if path == self.cfg.trainer.policy.model.path else str(resolve_model(path))

    def get_reference(self, policy: Any) -> Any:
        """A frozen policy to measure the KL from, or None where no KL term has a weight."""
        from skyrl_train.learner.learner import needs_reference
        from skyrl_train.policy.lora import BaseUnderAdapters
        from skyrl_train.policy.model import load_policy

        trainer = self.cfg.trainer
        if not needs_reference(trainer.algorithm):
            return None
        if trainer.policy.model.lora.rank > 0 and trainer.reference_is_base:
            return BaseUnderAdapters.of(policy)
        reference = load_policy(
            self.get_reference_path(),
            device=policy.device,
            compute_dtype=policy.compute_dtype,
            model_config_kwargs=trainer.ref.model_config_kwargs,
            max_length=self.max_length,
        )
        reference.module.requires_grad_(False)
        return reference

    def get_learner(self, policy: Any) -> Any:
        from skyrl_train.learner.learner import TorchLearner

        return TorchLearner(
            policy,
            self.trainer_section,
            num_training_steps=self.schedule.num_steps,
            temperature=self.cfg.generator.sampling_params.temperature,
            reference=self.get_reference(policy),
        )

    def get_engine(self, policy: Any) -> Any:
        from skyrl_train.engine.torch.engine import TorchEngine

        generator, cache = self.cfg.generator, {}
        if self.memory is not None:
            cache = {
                "kv_cache_bytes": self.memory.kv_cache_bytes,
                "session_cache_bytes": self.memory.session_cache_bytes,
            }
        return TorchEngine(
            policy,
            self.tokenizer,
            max_num_seqs=generator.max_num_seqs,
            max_num_batched_tokens=generator.max_num_batched_tokens,
            deterministic=self.cfg.trainer.deterministic,
            max_model_len=self.max_length,
            **cache,
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
        from skyrl_train.run.run import RunRefused

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

    def get_schedule(self) -> Any:
        """Refuses a data set that is smaller than a batch."""
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

        from skyrl_train.run.run import Run, run_info

        total_steps = self.schedule.num_steps
        environment = ", ".join(sorted({prompt.data_source for prompt in self.train_dataset}))
        torch.use_deterministic_algorithms(self.cfg.trainer.deterministic)
        device = f"{self.device}, {str(self.compute_dtype).removeprefix('torch.')}"
        info = run_info(self.cfg, Path(self.model_path).name, environment, device, total_steps)
        with Run.open(self.cfg, self.tokenizer, info, self.get_contents()) as run:
            if run.start.step >= total_steps:
                run.progress.print(
                    f"this run is complete: {run.start.step} of {total_steps} steps. To go on, raise trainer.epochs; "
                    "to start afresh, set trainer.resume_mode=none or another trainer.ckpt_path"
                )
            else:
                asyncio.run(self._train(run))
            return run.finish()

    async def _train(self, run: Any) -> None:
        """SIGTERM and SIGHUP end a run as Ctrl-C does: the task is cancelled, and everything it opened is closed.

        A SIGHUP that is ignored, as under nohup, stays ignored.
        """
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, asyncio.current_task().cancel)  # ty: ignore
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
            look_up=look_up_environment,
        )


def main(
    arguments: Sequence[str] | None = None,
    experiment: type[BasePPOExp] = BasePPOExp,
    root: type[SkyRLConfig] = SkyRLConfig,
) -> int:
    """Exit status: 0 done, 1 broken off (no environment works, no room on the disk), 2 refused before training,
    130 interrupted. What breaks otherwise shows its traceback.
    """
    with lasting_output():
        make_errors_visible()
        return _main(sys.argv[1:] if arguments is None else arguments, experiment, root)


def _main(arguments: Sequence[str], experiment: type[BasePPOExp], root: type[SkyRLConfig]) -> int:
    try:
        cfg = load_config(arguments, root)
    except ValueError as error:
        return _refused(error)
    from skyrl_train.policy.refusal import ModelRefused
    from skyrl_train.rollout.collector import EveryEpisodeFailed
    from skyrl_train.run.run import RunRefused

    try:
        exp = experiment(cfg)
    except (ValueError, OSError) as error:  # of the model or the data
        return _refused(error)
    try:
        result = exp.run()
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except (RunRefused, ModelRefused) as error:
        return _refused(error)
    except EveryEpisodeFailed as error:
        print(f"stopped: {error}\n{_how_to_go_on(cfg.trainer)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"interrupted; {_how_to_go_on(cfg.trainer)}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is None:
            raise
        print(f"broken off: cannot write {error.filename}: {error.strerror}{_room(error)}", file=sys.stderr)
        print(f"When there is room, {_how_to_go_on(cfg.trainer)}", file=sys.stderr)
        return 1
    return 0


def _room(error: OSError) -> str:
    """ " (0 MB free there)", if the system says."""
    folder = Path(error.filename).absolute()
    folder = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)
    with suppress(OSError):
        return f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB free there)"
    return ""


def _how_to_go_on(trainer: TrainerConfig) -> str:
    from skyrl_train.run.records.run_folder import checkpoint_steps

    steps = checkpoint_steps(Path(trainer.ckpt_path))
    if steps:
        return f"the same command goes on after step {steps[-1]}, the newest checkpoint in {trainer.ckpt_path}"
    return f"no checkpoint was due yet (trainer.ckpt_interval={trainer.ckpt_interval}): the same command begins again"


def look_up_environment(env_class: str) -> None:
    """Raises if no environment is registered under this id, or if what is registered cannot be imported."""
    from skyrl_gym.envs.registration import load_entry_point, spec

    load_entry_point(spec(env_class).entry_point)


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
