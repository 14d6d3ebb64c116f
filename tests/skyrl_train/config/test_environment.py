"""The configuration that an environment gets, and the section that an integration adds."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from skyrl_train.config import (
    ConfigError,
    EnvironmentConfig,
    Problem,
    Section,
    SkyRLConfig,
    env_config_for,
    load_config,
    to_flat_dict,
    validate_cfg,
)


@dataclass
class ServersConfig(Section):
    port: int = 8000
    names: list[str] = field(default_factory=list)

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(1, "port")


@dataclass
class PlainConfig:
    """A dataclass that knows nothing of sections."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be positive")


@dataclass
class WithServers(EnvironmentConfig):
    servers: ServersConfig = field(default_factory=ServersConfig)
    plain: PlainConfig = field(default_factory=PlainConfig)


@dataclass
class Root(SkyRLConfig):
    environment: WithServers = field(default_factory=WithServers)  # ty: ignore[incompatible-mutable-override]


@pytest.mark.parametrize("plus", ["", "+"])
def test_settings_of_ones_own_environment_need_no_declaration(plus):
    config = load_config(
        [f"{plus}environment.skyrl_gym.my_env.x=1", f"{plus}environment.skyrl_gym.my_env.deep={{a: [1, 2]}}"]
    )
    settings = env_config_for(config.environment, "my_env")
    assert settings == {"x": 1, "deep": {"a": [1, 2]}}
    assert (settings.x, settings["x"], settings.get("y", 5), settings.deep.a) == (1, 1, 5, [1, 2])
    assert to_flat_dict(config)["environment.skyrl_gym.my_env.x"] == 1


def test_settings_of_built_in_environments_have_defaults():
    config = load_config(["environment.skyrl_gym.search.topk=7"])
    assert env_config_for(config.environment, "search") == {
        "log_requests": False,
        "search_url": "http://127.0.0.1:8000/retrieve",
        "topk": 7,
        "timeout": 30,
    }


@pytest.mark.parametrize("env_id", ["gsm8k", "max_env_workers", "env_class", "skyrl-v2/weird id"])
def test_an_environment_without_settings_gets_none(env_id):
    assert env_config_for(load_config([]).environment, env_id) == {}


def test_a_missing_setting_is_named_with_those_there_are():
    settings = env_config_for(load_config([]).environment, "text2sql")
    with pytest.raises(AttributeError, match=r"no setting 'path'; it has \['db_path'\]"):
        _ = settings.path
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_an_integration_adds_a_section_by_subclassing_the_root():
    config = load_config(["environment.servers.port=9", "environment.plain.size=3", "trainer.epochs=2"], root=Root)
    assert isinstance(config, Root)
    assert isinstance(config.environment.servers, ServersConfig)
    assert (config.environment.servers.port, config.environment.plain.size, config.trainer.epochs) == (9, 3, 2)
    assert env_config_for(config.environment, "servers") == {"port": 9, "names": []}
    assert env_config_for(config.environment, "plain") == {"size": 3}
    assert to_flat_dict(config)["environment.plain.size"] == 3
    assert validate_cfg(config) == config


def test_rules_and_spelling_of_the_added_section_are_checked_with_the_rest():
    overrides = [
        "environment.servers.port=0",
        "environment.plain.size=0",
        "environment.servers.ports=1",
        "trainer.seed=x",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, root=Root)
    text = str(caught.value)
    assert "environment.servers.port=0 must be at least 1" in text
    assert "environment.plain size=0 must be positive" in text
    assert "did you mean environment.servers.port?" in text
    assert "trainer.seed=x has the wrong type" in text


def test_the_core_does_not_know_the_added_section():
    with pytest.raises(ConfigError, match=r"environment.servers.port is not a key"):
        load_config(["environment.servers.port=9"])
