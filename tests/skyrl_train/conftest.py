"""One fork server for all tests: its children start with everything imported, so that a kill hits the work itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator

import pytest

from tests.without_compiler import without_compiler

multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "skyrl_train.entrypoints.main_base",
        "skyrl_train.trainer",
        "skyrl_train.policy.pretrained",
        "skyrl_train.engine.torch.engine",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.generation.utils",
    ]
)


@pytest.fixture
def no_compiler() -> Generator[None]:
    with without_compiler():
        yield
