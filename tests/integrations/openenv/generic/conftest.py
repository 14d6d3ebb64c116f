"""A server that nobody here wrote: what the command `openenv init` of the package openenv-core makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without uv on its PATH the command leaves the lock file out, for which it would need a registry."""
    where = tmp_path_factory.mktemp("init")
    command = [str(Path(sys.executable).parent / "openenv"), "init", "my_env"]
    made = subprocess.run(
        command, cwd=where, env={**os.environ, "PATH": ""}, capture_output=True, text=True, timeout=200
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return where / "my_env"
