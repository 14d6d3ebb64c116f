"""Settings of the critic: its weights, adapters and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.config.models import LoraConfig, OptimizerConfig
from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section


@dataclass
class CriticLoraConfig(LoraConfig, at="trainer.critic.model.lora"):
    """Adapters of the critic: only they and the value head are trained."""


@dataclass
class CriticModelConfig(Section, at="trainer.critic.model"):
    """The critic's trunk."""

    path: str | None = None  # the model that the critic starts from, usually the policy's; null: no trunk of its own
    lora: CriticLoraConfig = field(default_factory=CriticLoraConfig)


@dataclass
class CriticOptimizerConfig(OptimizerConfig, at="trainer.critic.optimizer_config"):
    """AdamW and its schedule, of the critic alone."""

    lr: float = 5e-6  # peak learning rate; a value head alone (shares_policy) learns at 1e-3 or more


@dataclass
class CriticConfig(Section, at="trainer.critic"):
    """The model that predicts returns; advantage_estimator=gae compares with it."""

    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    # a value head on the policy's hidden states, without a second model: only the head learns from the value loss
    shares_policy: bool = False
    optimizer_config: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)
    model_config_kwargs: dict[str, Any] = field(default_factory=dict)  # overrides of the Hugging Face model config

    @property
    def is_on(self) -> bool:
        return self.shares_policy or self.model.path is not None

    def rules(self) -> Iterator[Problem]:
        if self.shares_policy and self.model.path is not None:
            problem = self.model.problem("path", "is not read with trainer.critic.shares_policy=true; drop one of them")
            yield problem.under("model")
        if self.model.path is None:
            if self.model.lora.rank > 0:
                problem = self.model.lora.problem(
                    "rank", "has no trunk to adapt; drop it, or set trainer.critic.model.path"
                )
                yield problem.under("model.lora")
            if self.model_config_kwargs:
                yield self.problem(
                    "model_config_kwargs", "has no model to change; drop it, or set trainer.critic.model.path"
                )
