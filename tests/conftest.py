"""The same chance for every test, in whatever order they run, and a home that is not the person's own."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests.home import move_in, move_out

HOME = move_in()  # before anything reads it
TOO_SLOW = HealthCheck.too_slow
# Hypothesis draws the same examples in every run, and takes whatever time a busy machine needs for one.
settings.register_profile("same", derandomize=True, database=None, deadline=None, suppress_health_check=[TOO_SLOW])
settings.load_profile("same")


def pytest_unconfigure() -> None:
    if HOME is not None:
        move_out(HOME)


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
