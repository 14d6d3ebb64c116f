"""The parts of an experiment that stand on its data: prompts, their order, and what the run's files hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from skyrl_train.config import EnvironmentConfig
from skyrl_train.config.environment import SINGLE_TURN
from skyrl_train.entrypoints.model_parts import ModelParts
from skyrl_train.types import AGENT

if TYPE_CHECKING:
    from skyrl_train.conversations import Conversations
    from skyrl_train.prompts import PromptRows, PromptSchedule
    from skyrl_train.rollout.rewards import Rewards


class DataParts(ModelParts):
    """Reads and checks the prompts of training and evaluation."""

    train_dataset: PromptRows | None  # None where nothing is trained
    eval_dataset: PromptRows | None
    rewards: Rewards | None  # what pays, where that is not the environments alone
    conversations: Conversations | None  # to imitate first

    def get_train_dataset(self) -> PromptRows | None:
        return self._dataset(self.cfg.data.train_data)

    def get_eval_dataset(self) -> PromptRows | None:
        """Return the validation prompts; None without any or with evaluation switched off."""
        if self.cfg.trainer.eval_interval <= 0 or not self.cfg.data.val_data:
            return None
        return self._dataset(self.cfg.data.val_data)

    def as_prompts(self, dataset: Any, method: str) -> PromptRows | None:
        """Return what `method` returned, perhaps of a class of the user's own, as prompts."""
        from skyrl_train.given_prompts import given_prompts

        return given_prompts(dataset, method, self.cfg.environment.env_class)

    def get_rewards(self) -> Rewards | None:
        """Return what pays the turns, tried on the data; None where environments alone do it."""
        environment = self.cfg.environment
        if environment.reward is None and not environment.rewards:
            return None
        from skyrl_train.rollout.rewards import Rewards

        rewards = Rewards.of(environment.reward, environment.named_rewards)
        if rewards is not None:
            prompts = [*(self.train_dataset or []), *(self.eval_dataset or [])]
            rewards.check(prompts, self.cfg.generator.step_timeout_s)
        return rewards

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

    def get_conversations(self) -> Conversations | None:
        """Return the conversations that are imitated before RL; None without any. DataError for a row that is none."""
        from skyrl_train.conversations import Conversations, read_conversations

        sft = self.cfg.trainer.sft
        if not sft.is_on or self.train_dataset is None:
            return None
        samples = read_conversations(sft.data, self.chat_template, self.max_length)
        return Conversations(samples, sft.batch_size, sft.epochs, self.cfg.trainer.seed)

    def get_schedule(self) -> PromptSchedule | None:
        """Return which prompts each step takes; None without training data. ValueError for less than a batch."""
        from skyrl_train.prompts import PromptSchedule

        if self.train_dataset is None:
            return None
        trainer = self.cfg.trainer
        return PromptSchedule(len(self.train_dataset), trainer.train_batch_size, trainer.epochs, trainer.seed)

    def get_contents(self) -> dict[str, dict[str, str]]:
        """Return what the files hold that the settings name (contents.py): a run is resumed only with the same."""
        from skyrl_train.learner.learner import needs_reference
        from skyrl_train.policy.pretrained import resolve_model
        from skyrl_train.run.contents import model_contents, prompt_contents, sample_contents, template_contents

        trainer, template = self.cfg.trainer, self.chat_template.template_kwargs.get("chat_template")
        policy = model_contents(self.model_path)
        contents = {
            "trainer.policy.model.path": policy,
            "generator.chat_template.name_or_path": template_contents(template or self.tokenizer.chat_template),
        }
        for key, prompts in (("data.train_data", self.train_dataset), ("data.val_data", self.eval_dataset)):
            if prompts is not None:
                contents[key] = prompt_contents(prompts)
        if self.rewards is not None and self.rewards.judges:
            texts = self.rewards.templates.items()
            contents["environment.rewards"] = {name: template_contents(text)["template"] for name, text in texts}
        if self.conversations is not None:
            contents["trainer.sft.data"] = sample_contents(self.conversations.samples)
        if trainer.ref.model.path == trainer.policy.model.path:
            contents["trainer.ref.model.path"] = policy
        elif needs_reference(trainer.algorithm):
            contents["trainer.ref.model.path"] = model_contents(resolve_model(trainer.ref.model.path))
        if self.critic_path is not None:
            contents["trainer.critic.model.path"] = model_contents(self.critic_path)
        return contents

    @property
    def plays_environments(self) -> bool:
        """Return whether the rows' environments play the episodes, and no agent or generator of the user's does."""
        return self.cfg.generator.agent is None

    def _dataset(self, sources: Sequence[str]) -> PromptRows:
        from skyrl_train.prompts import PromptRows

        agent = self.cfg.generator.agent
        if agent is not None:
            from skyrl_train.rollout.agents.episode import Agent

            Agent.named(agent)
        return PromptRows(
            list(sources),
            self.tokenizer,
            self.cfg.trainer.max_prompt_length,
            self.cfg.environment.env_class if agent is None else AGENT,
            self.chat_template.template_kwargs,
            look_up=partial(look_up_environment, self.cfg.environment) if self.plays_environments else None,
            prompt_column=self.cfg.data.prompt_column,
        )


def look_up_environment(environment: EnvironmentConfig, env_class: str) -> None:
    """Raise if this is no environment, cannot be imported, made or run here, or only the data set names its code."""
    from skyrl_gym.class_check import wrong_in
    from skyrl_gym.envs.base_text_env import BaseTextEnv
    from skyrl_gym.envs.registration import load_entry_point, spec

    if not environment.trusts(env_class):
        raise ValueError(
            "the data set's row names code to run, and the configuration does not: "
            f"environment.env_classes=['{env_class}'] allows it; environment.trust_dataset_code=true trusts all rows"
        )
    if env_class == SINGLE_TURN and not environment.pays_itself:
        raise ValueError("it pays nothing by itself; set environment.reward=my_module:my_function, too")
    recipe = spec(env_class)
    made = load_entry_point(recipe.entry_point)
    if wrong := "; ".join(wrong_in(made, **recipe.kwargs)):
        raise TypeError(wrong)
    if isinstance(made, type) and issubclass(made, BaseTextEnv):
        made.check_machine()
