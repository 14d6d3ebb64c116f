"""The root of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from loguru import logger
from omegaconf import DictConfig, OmegaConf

from skyrl_train.config.build import build
from skyrl_train.config.conditions import keys_without_effect
from skyrl_train.config.data import DataConfig
from skyrl_train.config.environment import EnvironmentConfig
from skyrl_train.config.generator import GeneratorConfig
from skyrl_train.config.overrides import tree_of
from skyrl_train.config.problems import Problem, written
from skyrl_train.config.section import Section, is_interpolation
from skyrl_train.config.trainer import TrainerConfig
from skyrl_train.config.tree import leaves
from skyrl_train.config.validation import advice, named_reward_problems, problems_across_sections, reward_problems


@dataclass
class SkyRLConfig(Section, at=""):
    """All settings of a run. An integration adds its section to `environment` in a subclass."""

    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)

    @classmethod
    def from_dict_config(cls, config: DictConfig | Mapping[str, Any]) -> Self:
        """Return the typed tree of a configuration that Hydra composed; keys that are left out keep their defaults."""
        settings: Any = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
        return build(cls, settings.items())

    @classmethod
    def from_cli_overrides(cls, args: Sequence[str] | Mapping[str, Any]) -> Self:
        """Return the tree after overrides: ["trainer.epochs=2"] or {"trainer.epochs": 2}."""
        texts = [written(key, value) for key, value in args.items()] if isinstance(args, Mapping) else list(args)
        return tree_of(texts, cls).advised()

    def settle(self) -> None:
        algorithm, generator = self.trainer.algorithm, self.generator
        if algorithm.loss_reduction == "seq_mean_token_sum_norm" and algorithm.max_seq_len is None:
            lengths = (generator.max_input_length, generator.sampling_params.max_generate_length)
            if not any(map(is_interpolation, lengths)):
                algorithm.max_seq_len = sum(lengths)

    def rules(self) -> Iterator[Problem]:
        if not any(is_interpolation(value) for _, value in leaves(self)):
            yield from keys_without_effect(self)
            yield from problems_across_sections(self.data, self.trainer, self.generator)
            yield from reward_problems(self.environment, self.generator)
            yield from named_reward_problems(self.environment, self.trainer)

    def advised(self) -> Self:
        """Return this tree, after a warning about each setting that is allowed but rarely intended."""
        for sentence in advice(self.data, self.trainer, self.generator):
            logger.warning(sentence)
        return self
