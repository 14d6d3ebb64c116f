"""C source to functions in this process, with whatever C compiler the machine has. Does not import torch.

Compiled anew each time, in half a second, with the processor's own instructions: nothing can be stale or come from
another machine. The library shares torch's OpenMP threads: it is linked without OpenMP, so that its calls find the
runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from skyrl_gym.temporary_folders import COMPILER, temporary_folder

FREE_ORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")  # a NaN stays one
FLAGS = ("-O3", "-march=native", *FREE_ORDER, "-fopenmp", "-fPIC")
HEADERS = Path(__file__).with_name("c")  # of all sources
COMPILE_TIMEOUT_S = 60


class NoCompiler(RuntimeError):
    """There is none, or it cannot build or load this source."""


def c_compiler() -> str | None:
    """CC, else cc or gcc on the PATH."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def compiled_library(source: Path, definitions: Sequence[str]) -> ctypes.CDLL:
    """Compile and load a C file; definitions: `-DNAME=VALUE`. Raises NoCompiler with the compiler's own words."""
    if (compiler := c_compiler()) is None:
        raise NoCompiler("there is no C compiler on the PATH")
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    try:
        with temporary_folder(COMPILER) as folder:
            unit, library = f"{folder}/unit.o", f"{folder}/library.so"
            _run([*compiler.split(), *FLAGS, *wide, *definitions, f"-I{HEADERS}", "-c", str(source), "-o", unit])
            _run([*compiler.split(), "-shared", unit, "-lm", "-o", library])
            return ctypes.CDLL(library)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        raise NoCompiler(f"{compiler} cannot build {source.name}: {words.strip()}") from error


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
