"""The learner as on CUDA, on a processor that pretends to be a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.learner.gradient import logprobs_of
from skyrl_train.learner.passes import Budget
from tests.pretend_cuda import PretendCuda
from tests.skyrl_train.batches import random_batch, shared_batch
from tests.tiny_models import tiny_policy

BATCHES = {"random": random_batch, "shared prefixes": shared_batch}


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_logprobs_are_the_processors(family: str, batch_name: str) -> None:
    batch, budget = BATCHES[batch_name](), Budget(100)
    expected = logprobs_of(tiny_policy(family), batch, temperature=1.3, budget=budget)
    with torch.no_grad(), PretendCuda():
        policy = tiny_policy(family, device="cuda")
        assert policy.device.type == "cuda"
        assert_close(logprobs_of(policy, batch, temperature=1.3, budget=budget), expected, atol=1e-4, rtol=1e-4)


def test_updates_are_the_processors() -> None:
    command = [sys.executable, "-m", "tests.skyrl_train.learner.on_pretended_device"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=Path(__file__).parents[3])
    assert said.returncode == 0, said.stderr[-3000:]
    distances = json.loads(said.stdout.splitlines()[-1])
    assert len(distances) == 6
    assert max(distances.values()) < 1e-2  # Adam's first step is a sign, which rounding decides where there is nothing
