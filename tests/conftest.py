"""The same chance for every test, in whatever order they run; and which of them run beside each other (`-n 2`)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
# With pytest-xdist a group runs in one process. Elsewhere each file is a group; these share a costly fixture, or what
# the machine has one of.
TOGETHER = {
    "shared memory": ("skyrl_train/cluster", "skyrl_train/engine/vllm", "skyrl_train/weights", "skyrl/test_mains.py"),
    "docker": (
        "integrations/openenv/hosting", "integrations/openenv/images", "integrations/openenv/servers/test_walls.py",
    ),
    "runs": ("skyrl_train/commands",),
    "pages": ("skyrl_train/view",),
}  # fmt: skip

TOO_SLOW = HealthCheck.too_slow
# Hypothesis draws the same examples in every run, and takes whatever time a busy machine needs for one.
settings.register_profile("same", derandomize=True, database=None, deadline=None, suppress_health_check=[TOO_SLOW])
settings.load_profile("same")


def same_chance() -> None:
    """Seed what a test or the code under it may draw from: no outcome depends on luck, or on the test before it."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    same_chance()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    same_chance()


def group_of(file: Path) -> str:
    place = file.relative_to(TESTS).as_posix()
    return next((name for name, places in TOGETHER.items() if place.startswith(places)), place)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item.path)))
