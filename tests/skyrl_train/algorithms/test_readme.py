"""The table of algorithms: each line is a configuration that is accepted, and no loss or estimator is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skyrl_train import algorithms
from skyrl_train.config import SkyRLConfig
from skyrl_train.config.algorithm import OWN_ESTIMATORS, OWN_LOSSES
from skyrl_train.config.validation import advice

TEXT = (Path(algorithms.__file__).parent / "README.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `(.*)` \|$", TEXT, re.MULTILINE)


def full(setting: str) -> str:
    return setting if setting.startswith(("environment.", "generator.", "trainer.")) else f"trainer.algorithm.{setting}"


@pytest.mark.parametrize(("name", "settings"), ROWS, ids=[name for name, _ in ROWS])
def test_the_settings_of_a_paper_are_accepted_without_a_warning(name: str, settings: str) -> None:
    data = ["data.train_data=['x.jsonl']", "data.val_data=['x.jsonl']"]
    config = SkyRLConfig.from_cli_overrides([*data, *map(full, settings.split())])
    assert list(advice(config.data, config.trainer, config.generator)) == []


def test_every_loss_and_estimator_with_a_paper_has_a_line() -> None:
    set_in_it = {setting for _, settings in ROWS for setting in settings.split()}
    losses = {name for name in OWN_LOSSES if f"policy_loss_type={name}" not in set_in_it}
    estimators = {name for name in OWN_ESTIMATORS if f"advantage_estimator={name}" not in set_in_it}
    assert losses == {"regular", "cross_entropy"}
    assert estimators == {"grpo"}
