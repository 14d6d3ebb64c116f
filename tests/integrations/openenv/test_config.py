from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from integrations.openenv.config import OpenEnvConfig


@pytest.mark.parametrize(
    "given",
    [
        OpenEnvConfig(max_sessions=4),
        {"max_sessions": 4},
        OmegaConf.create({"max_sessions": 4}),
        OmegaConf.structured(OpenEnvConfig(max_sessions=4)),
    ],
    ids=["instance", "mapping", "node", "structured node"],
)
def test_any_form_of_configuration_is_accepted(given: object) -> None:
    assert OpenEnvConfig.from_any(given) == OpenEnvConfig(max_sessions=4)


def test_nothing_is_the_defaults() -> None:
    assert OpenEnvConfig.from_any(None) == OpenEnvConfig.from_any({}) == OpenEnvConfig()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"runtime": "cloud"}, "must be one of auto, local, docker, url"),
        ({"runtime": "url"}, "needs openenv.url"),
        ({"runtime": "local", "url": "http://host:1"}, "no effect"),
        ({"runtime": "docker", "url": "http://host:1"}, "no effect"),
        ({"max_sessions": 0}, "max_sessions=0"),
        ({"max_servers": 0}, "max_servers=0"),
        ({"idle_timeout_s": -1}, "idle_timeout_s=-1"),
        ({"memory_gb": 0}, "memory_gb=0"),
        ({"step_timeout_s": 0}, "step_timeout_s=0"),
        ({"startup_timeout_s": float("nan")}, "startup_timeout_s=nan"),
        ({"invalid_action_penalty": -1}, "must not be negative"),
        ({"max_session": 3}, "unknown openenv option"),
    ],
)
def test_wrong_values_are_refused_with_the_reason(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        OpenEnvConfig.from_any(wrong)


def test_equal_configurations_share_their_servers_whatever_the_options() -> None:
    assert OpenEnvConfig(options={"game": "chess"}).key() == OpenEnvConfig().key()
    assert OpenEnvConfig(network=True).key() != OpenEnvConfig().key()
