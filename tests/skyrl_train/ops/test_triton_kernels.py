"""The Triton kernels without a GPU: Triton's interpreter computes them on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def test_interpreted_kernels_compute_what_plain_torch_does() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds and with vLLM")
    done = subprocess.run(
        [sys.executable, "-m", "tests.skyrl_train.ops.interpreted"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    far = json.loads(done.stdout.splitlines()[-1])
    assert len(far) == 7
    for name, distance in far.items():
        assert distance <= (0 if "written" in name or "rounded" in name else 2e-5), (name, distance)
