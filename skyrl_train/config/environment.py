"""The environment of prompts that name none, and the settings that each environment receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section, is_section
from skyrl_train.config.settings import EnvSettings, as_settings


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

    env_class: str = "gsm8k"  # id of the environment for rows that name none
    skyrl_gym: SkyRLGymConfig = field(default_factory=SkyRLGymConfig)

    def rules(self) -> Iterator[Problem]:
        if not self.env_class:
            yield self.problem("env_class", "is empty; name a registered environment")


def env_config_for(environment: EnvironmentConfig, env_id: str) -> EnvSettings:
    """Return the settings of one environment: environment.skyrl_gym.<id>, else environment.<id>, else none."""
    for section in (environment.skyrl_gym, environment):
        settings = vars(section).get(env_id)
        if isinstance(settings, dict) or is_section(settings):
            return as_settings(settings)
    return EnvSettings()
