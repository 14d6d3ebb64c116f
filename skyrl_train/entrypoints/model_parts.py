"""The parts of an experiment that stand on the model: device, tokenizer, chat template, policy, reference, learner.

Heavy imports live in the methods, so that a mistyped key is refused before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from skyrl_train.config import LoraConfig, SkyRLConfig, TrainerConfig
from skyrl_train.entrypoints.process import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.cluster.placement import Placement
    from skyrl_train.policy.memory_plan import MemoryPlan
    from skyrl_train.policy.model import Policy
    from skyrl_train.policy.value_head import Critic
    from skyrl_train.rollout.chat import ChatTemplate


BUILT_IN_OTHER_PROCESSES = (
    "cfg", "device", "compute_dtype", "placement", "model_path", "critic_path", "num_embeddings", "memory", "tokenizer",
    "schedule",
)  # fmt: skip


class ModelParts:
    """Builds the parts that compute with the model's weights or use its tokens."""

    cfg: SkyRLConfig
    device: torch.device
    compute_dtype: torch.dtype
    placement: Placement
    model_path: str
    critic_path: str | None
    num_embeddings: int
    memory: MemoryPlan | None  # None on a CPU
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate

    def get_model_path(self) -> str:
        """Return a folder on this machine, or a hub name that transformers can load."""
        from skyrl_train.policy.pretrained import resolve_model

        return str(resolve_model(self.cfg.trainer.policy.model.path))

    def get_num_embeddings(self) -> int:
        """Return how many tokens the model knows, by its configuration."""
        from skyrl_train.policy.model_files import load_config

        config = load_config(self.model_path, self.cfg.trainer.policy.model_config_kwargs)
        return config.get_text_config().vocab_size

    def get_tokenizer(self, padding_side: str | None = None) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Nothing here pads; `padding_side` is for code of the user's that does."""
        from skyrl_train.policy.model_files import load_tokenizer

        tokenizer = load_tokenizer(self.model_path)
        if padding_side is not None:
            tokenizer.padding_side = padding_side
        return tokenizer

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def check_teacher(self) -> None:
        """Refuse a teacher that reads other tokens than the policy: its logprobs would be of other texts."""
        from skyrl_train.policy.model_files import load_tokenizer

        if not self.cfg.trainer.algorithm.distills:
            return
        teacher = load_tokenizer(self.get_reference_path()).get_vocab()
        ours = self.tokenizer.get_vocab()
        if teacher != ours:
            num_different = sum(teacher.get(token) != number for token, number in ours.items())
            raise ValueError(
                f"trainer.ref.model.path={self.cfg.trainer.ref.model.path} is the teacher, and {num_different} of the "
                f"policy's {len(ours)} tokens are others there: take a teacher with the policy's tokenizer"
            )

    def get_chat_template(self) -> ChatTemplate:
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
                step_wise=generator.step_wise_trajectories,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template cannot print a question and its answer: {error}") from error

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

    def get_device(self) -> tuple[torch.device, torch.dtype]:
        """Return device and compute dtype; the reason for the choice is printed."""
        from loguru import logger

        from skyrl_train.policy.precision import choose_compute_dtype, choose_device

        device = choose_device(self.cfg.trainer.device)
        dtype, reason = choose_compute_dtype(device, self.cfg.trainer.bf16)
        logger.info(reason)
        return device, dtype

    def get_placement(self) -> Placement:
        """Return which process computes on which device. ValueError, with the arithmetic, where it does not fit."""
        from loguru import logger

        from skyrl_train.cluster.placement import place, refuse_missing_packages, resources_here
        from skyrl_train.engine.vllm.settings import refuse_what_vllm_cannot

        if self.cfg.generator.backend == "vllm":
            refuse_what_vllm_cannot(self.cfg)
        placement = place(self.cfg, resources_here(), on_gpu=self.device.type == "cuda")
        if not placement.in_process:
            refuse_missing_packages(self.cfg)
            logger.info(f"one process for each: {placement}")
        return placement

    def for_other_processes(self) -> Self:
        """Return this experiment without what belongs to this process alone: what builds a part in another one."""
        copied = object.__new__(type(self))
        for name in BUILT_IN_OTHER_PROCESSES:
            setattr(copied, name, getattr(self, name))
        return copied

    def get_memory_plan(self) -> MemoryPlan | None:
        """Plan a GPU's memory before anything large is loaded; None on a CPU. ValueError if the run does not fit."""
        if self.device.type != "cuda":
            return None
        from skyrl_train.policy.lora import NoSuchModules
        from skyrl_train.policy.model_memory import meta_module, plan_of_run

        trainer, generator = self.cfg.trainer, self.cfg.generator
        module = meta_module(self.model_path, self.compute_dtype, trainer.policy.model_config_kwargs)
        critic = None
        if self.critic_path is not None:
            critic = meta_module(self.critic_path, self.compute_dtype, trainer.critic.model_config_kwargs)
        references = self.num_reference_weights()
        try:
            return plan_of_run(
                module,
                trainer,
                generator,
                self.device,
                reference_weights=references,
                critic=critic,
                engine_share=self.engine_share,
            )
        except NoSuchModules as error:
            section = (
                "trainer.policy.model.lora" if critic is None else "model.lora of trainer.policy or trainer.critic"
            )
            raise ValueError(f"{section}: {error}") from error

    @property
    def engine_share(self) -> float | None:
        """Return the share of a rank's GPU that an engine of another process takes; None: the engine is in this one."""
        if self.placement.in_process:
            return None
        return self.cfg.generator.gpu_memory_utilization if self.placement.takes_turns else 0.0

    def num_reference_weights(self) -> int:
        """Return the number of weights of a reference policy that must be loaded beside the policy; else 0."""
        from skyrl_train.learner.learner import needs_reference
        from skyrl_train.policy.model_memory import meta_module, num_weights

        trainer = self.cfg.trainer
        is_under_adapters = trainer.policy.model.lora.rank > 0 and trainer.reference_is_base
        if is_under_adapters or not needs_reference(trainer.algorithm):
            return 0
        return num_weights(meta_module(self.get_reference_path(), self.compute_dtype, trainer.ref.model_config_kwargs))

    @property
    def trainer_section(self) -> TrainerConfig:
        """The trainer's section, completed with what it left to the memory plan."""
        trainer, memory = self.cfg.trainer, self.memory
        if memory is None:  # a CPU
            is_on = trainer.gradient_checkpointing is not False
            return replace(trainer, max_tokens_per_microbatch=trainer.token_budget, gradient_checkpointing=is_on)
        return replace(
            trainer,
            max_tokens_per_microbatch=memory.token_budget,
            gradient_checkpointing=memory.gradient_checkpointing,
        )

    def get_policy(self) -> Policy:
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
            four_bit=trainer.policy.model.load_in_4bit,
        )
        if trainer.policy.model.lora.rank > 0:
            self.add_adapters(policy, trainer.policy.model.lora, "trainer.policy.model.lora")
        return policy

    def add_adapters(self, policy: Policy, lora: LoraConfig, section: str) -> None:
        """Give a model the adapters of this section. RunRefused for modules that it does not have."""
        from loguru import logger

        from skyrl_train.policy.lora import NoSuchModules, add_adapters
        from skyrl_train.run.run import RunRefused

        try:
            add_adapters(policy, lora, seed=self.cfg.trainer.seed)
        except NoSuchModules as error:
            raise RunRefused(f"{section}: {error}") from error
        trained = sum(weight.numel() for weight in policy.weights.values() if weight.requires_grad)
        logger.info(f"{section}: training adapters of {trained:,} weights; the model itself stays as it is")

    def get_critic_path(self) -> str | None:
        """Return a folder on this machine, or None without a trunk of its own.

        ValueError for a model that does not know all of the policy's tokens.
        """
        from skyrl_train.policy.model_files import load_config
        from skyrl_train.policy.pretrained import resolve_model

        critic, policy = self.cfg.trainer.critic, self.cfg.trainer.policy
        if critic.model.path in (None, policy.model.path):
            return critic.model.path and self.model_path
        path = str(resolve_model(critic.model.path))
        num_tokens = load_config(path, critic.model_config_kwargs).get_text_config().vocab_size
        if num_tokens < self.num_embeddings:
            raise ValueError(
                f"trainer.critic.model.path={critic.model.path} knows {num_tokens} tokens, the policy "
                f"{self.num_embeddings}: it reads the policy's tokens, so take a model with the same tokenizer, or "
                f"{policy.model.path} itself"
            )
        return path

    def get_critic(self, policy: Policy) -> Critic | None:
        """Return the critic, with a trunk of its own or on the policy's hidden states; None where none is asked for."""
        from skyrl_train.policy.model import load_policy
        from skyrl_train.policy.value_head import Critic

        trainer = self.trainer_section
        critic = trainer.critic
        if critic.shares_policy:
            return Critic.on(policy)
        if self.critic_path is None:
            return None
        trunk = load_policy(
            self.critic_path,
            device=policy.device,
            compute_dtype=policy.compute_dtype,
            model_config_kwargs=critic.model_config_kwargs,
            gradient_checkpointing=bool(trainer.gradient_checkpointing),
            max_length=self.max_length,
        )
        if critic.model.lora.rank > 0:
            self.add_adapters(trunk, critic.model.lora, "trainer.critic.model.lora")
        return Critic.of(trunk)

    def get_reference_path(self) -> str:
        """Return a folder on this machine, fetched if need be; the policy's own where they are the same."""
        from skyrl_train.policy.pretrained import resolve_model

        path = self.cfg.trainer.ref.model.path
        return self.model_path if path == self.cfg.trainer.policy.model.path else str(resolve_model(path))

    def get_reference(self, policy: Policy) -> Policy | None:
        """Return a frozen policy to measure the KL from, or None where no KL term has a weight."""
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
