"""The environment of prompts that name none, and the settings that each environment receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from skyrl_gym.importing import is_import_path
from skyrl_train.config.problems import NO_VALUE, Problem
from skyrl_train.config.rewards import NamedReward, named_rewards, wrong_rewards
from skyrl_train.config.section import Section, is_section
from skyrl_train.config.settings import EnvSettings, as_settings

SINGLE_TURN = "single_turn"


@dataclass
class Text2SQLConfig(Section, at="environment.skyrl_gym.text2sql"):
    """Settings of the text2sql environment."""

    db_path: str = "/home/ray/default/sql_data"  # root folder of the SQL databases


@dataclass
class LLMAsAJudgeConfig(Section, at="environment.skyrl_gym.llm_as_a_judge"):
    """Settings of the llm_as_a_judge environment."""

    model: str = "gpt-4o-mini"  # the judge
    base_url: str | None = None  # where the judge answers; null: the client's own default


@dataclass
class SearchConfig(Section, at="environment.skyrl_gym.search"):
    """Settings of the search environment."""

    log_requests: bool = False  # log each retrieval
    search_url: str = "http://127.0.0.1:8000/retrieve"  # the retrieval server
    topk: int = 3  # passages per query
    timeout: int = 30  # seconds per request


@dataclass
class SkyRLGymConfig(Section, at="environment.skyrl_gym"):
    """Settings per environment id. Any id may be used: environment.skyrl_gym.my_env.difficulty=3."""

    takes_any_key: ClassVar[bool] = True

    max_env_workers: int = 32  # threads for environments whose methods block; 0 counts as 1
    text2sql: Text2SQLConfig = field(default_factory=Text2SQLConfig)
    llm_as_a_judge: LLMAsAJudgeConfig = field(default_factory=LLMAsAJudgeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(0, "max_env_workers")


@dataclass
class EnvironmentConfig(Section, at="environment"):
    """The environments."""

    # of rows that name none: id of a registered environment, or a class of yours as my_module:MyEnv
    env_class: str = "gsm8k"
    # my_module:my_function decides what a turn earns, in the place of the environment (skyrl_train/rollout/reward.py)
    reward: str | None = None
    # several rewards by name: my_module:my_function, environment or judge, each with a weight (config/rewards.py)
    rewards: dict[str, Any] = field(default_factory=dict)
    env_classes: list[str] = field(default_factory=list)  # further classes (my_module:MyEnv) that rows may name
    trust_dataset_code: bool = False  # let rows name any class that can be imported: it runs as your own code
    skyrl_gym: SkyRLGymConfig = field(default_factory=SkyRLGymConfig)

    def settle(self) -> None:
        if self.pays_itself and self.env_class == "gsm8k":  # the default: rows without an environment take one reply
            self.env_class = SINGLE_TURN

    @property
    def pays_itself(self) -> bool:
        """Return whether a function or a judge pays, so that the environment need not."""
        if self.reward:
            return True
        values = self.rewards.values() if isinstance(self.rewards, dict) else ()
        return any(not isinstance(value, int | float) and value != "environment" for value in values)

    @property
    def named_rewards(self) -> dict[str, NamedReward]:
        return named_rewards(self.rewards)

    @property
    def reward_weights(self) -> dict[str, float]:
        """Return the weight of each reward that is named here; any other one weighs 1."""
        return {name: reward.weight for name, reward in self.named_rewards.items()}

    def rules(self) -> Iterator[Problem]:
        if not self.env_class:
            yield self.problem("env_class", "is empty; name a registered environment, or a class as my_module:MyEnv")
        if self.env_class == SINGLE_TURN and not self.pays_itself:
            yield self.problem("env_class", "pays nothing by itself; set environment.reward=my_module:my_function, too")
        if self.reward is not None and not is_import_path(self.reward):
            yield self.problem("reward", "must name a function as my_module:my_function")
        if self.reward is not None and self.rewards:
            yield self.problem("reward", "pays alone, so environment.rewards is never asked; drop one of the two")
        for name, value, says in wrong_rewards(self.rewards):
            yield Problem(f"rewards.{name}" if name else "rewards", value or NO_VALUE, says)
        for name in self.env_classes:
            if not is_import_path(name):
                yield self.problem("env_classes", f"must name classes as my_module:MyEnv; {name!r} has another form")

    def trusts(self, env_class: str) -> bool:
        """Return whether a data set's row may name this environment: a registered one, or one that is named here."""
        named = (self.env_class, *self.env_classes)
        return self.trust_dataset_code or not is_import_path(env_class) or env_class in named


def env_config_for(environment: EnvironmentConfig, env_id: str) -> EnvSettings:
    """Return the settings of one environment: environment.skyrl_gym.<id>, else environment.<id>, else none.

    The settings of the class my_module:MyEnv stand under MyEnv.
    """
    for section in (environment.skyrl_gym, environment):
        settings = vars(section).get(env_id.rpartition(":")[2])
        if isinstance(settings, dict) or is_section(settings):
            return as_settings(settings)
    return EnvSettings()
