"""run_openenv.sh as a worker's command: the user's command line, with a worker instead of the trainer.

The script looks for uv first on the PATH. There we put a uv that replaces one word, the trainer's module by the
worker's, and calls the real one. So the recipe and everything before the trainer are the script's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.benchmarks.side_by_side import ROOT

SCRIPT = ROOT / "integrations" / "openenv" / "run_openenv.sh"
TRAINER = "integrations.openenv.entrypoints.main_openenv"


def command(*arguments: str) -> list[str]:
    return ["bash", str(SCRIPT), *arguments]


def variables(worker: str, folder: Path, path: str) -> dict[str, str]:
    """Return the environment variables with which the script starts `worker` and keeps its files in `folder`."""
    uv = shutil.which("uv")
    if uv is None:
        raise FileNotFoundError(
            "run_openenv.sh is timed with uv, which is not on the PATH; install it (pip install uv)"
        )
    stand_in = folder / "bin" / "uv"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(
        "#!/bin/sh\n"
        "for word do\n"
        "  shift\n"
        f'  [ "$word" = {TRAINER} ] && word=tests.benchmarks.workers.{worker}\n'
        '  set -- "$@" "$word"\n'
        "done\n"
        f'exec "{uv}" "$@"\n'
    )
    stand_in.chmod(0o755)
    return {
        "PATH": f"{stand_in.parent}:{path}",
        "ENV_NAME": "echo_env",
        "DATA_DIR": str(folder / "data"),
        "CKPT_PATH": str(folder / "run"),
    }
