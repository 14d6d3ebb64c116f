"""No test's outcome depends on luck: see conftest.py."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_draws_the_same_numbers(time):
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    generators = (random.Random(0).random(), np.random.RandomState(0).rand())
    assert drawn == (*generators, torch.rand((), generator=torch.Generator().manual_seed(0)).item())


def test_hypothesis_draws_the_same_examples_and_knows_no_deadline():
    ours = settings()
    assert (ours.derandomize, ours.database, ours.deadline) == (True, None, None)
    assert HealthCheck.too_slow in ours.suppress_health_check
