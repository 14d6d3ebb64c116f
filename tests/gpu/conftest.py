"""Tests that need a CUDA GPU: `pytest tests/gpu`. Without one they are skipped. They reach for nothing outside."""

from __future__ import annotations

import pytest
import torch

from tests.skyrl_train.engine.conftest import make_engine as make_engine


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU here")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
