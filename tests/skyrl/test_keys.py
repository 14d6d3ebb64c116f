"""Every key of SkyRL's configuration, the last old one and the newest, is accepted or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.config.overrides import with_overrides
from skyrl_train.config.problems import Problem
from skyrl_train.config.refused import NEWEST
from skyrl_train.config.root import SkyRLConfig

KEYS = Path(__file__).with_name("keys.txt").read_text().split()
NOT_KNOWN = ("is not a key of the configuration", "looks like")


def problems(*overrides: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        with_overrides(overrides, SkyRLConfig)
    return {problem.key: problem for problem in caught.value.problems}


def test_none_of_skyrls_keys_is_unknown():
    assert len(KEYS) == len(set(KEYS)) > 400
    found = problems(*(f"{key}=1" for key in KEYS), "trainer.no_such_key=1")
    unknown = [key for key, problem in found.items() if any(words in problem.says for words in NOT_KNOWN)]
    assert unknown == ["trainer.no_such_key"]


def test_a_key_of_the_newest_alone_is_refused_with_a_way_out():
    found = problems(*(f"{key}=1" for key in KEYS))
    for key, reason in NEWEST.items():
        assert "drop it" in reason or "use " in reason
        below = [problem.says for refused, problem in found.items() if refused == key or refused.startswith(f"{key}.")]
        assert set(below) <= {reason}
        assert below or key.endswith(("torch_profiler_config", "_gpus_per_node"))


def test_an_entry_below_a_refused_null_is_refused_and_no_crash():
    with pytest.raises(ConfigError, match=r"trainer.rope_scaling={rope_type:yarn} is not read"):
        load_config(["trainer.rope_scaling.rope_type=yarn"])
