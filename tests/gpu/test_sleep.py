"""vLLM on a GPU that it shares with the learner: asleep it holds no memory, and a push after it is whole."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLEEPS = Path(__file__).with_name("sleeps.py")


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: uv sync --inexact --extra vllm"
)
@pytest.mark.timeout(600)
def test_an_engine_gives_its_memory_back_and_takes_the_next_weights() -> None:
    """Importing vLLM changes a process, so it runs in one of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SLEEPS)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
