"""One fork server for all tests: its children start with everything imported, so that a kill hits the work itself."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from skyrl_gym.envs.registration import deregister, register
from skyrl_train.rollout import attempts
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model
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


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play failed episodes again at once: how long the pauses are is tested in integrations/openenv."""
    monkeypatch.setattr(attempts, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def no_compiler() -> Generator[None]:
    with without_compiler():
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A folder with a tiny model and four tasks, and a registered environment."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i} → ☃"}]} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("even", EvenEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)
    deregister("even")
