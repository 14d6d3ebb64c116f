"""Worker of one session: it runs programs in smolagents' interpreter, after giving up every right it can."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from typing import Any

from smolagents.local_python_executor import BASE_BUILTIN_MODULES, InterpreterError, LocalPythonExecutor

from integrations.openenv.servers.programs import CPU_LIMIT_S, MAX_OUTPUT_CHARS, WALL_LIMIT_S, capped
from skyrl_gym.walls.confinement import confine

ALLOWED_IMPORTS = ["json"]  # besides smolagents' own: collections datetime itertools math queue random re stat ...

for module in (*BASE_BUILTIN_MODULES, *ALLOWED_IMPORTS):
    __import__(module)  # now, because a confined worker cannot open files


def make_answer(seed: int | None) -> Callable[[str], dict[str, Any]]:
    """Return the function that runs a program; variables are kept from one program to the next.

    seed: for Python's `random`.
    """
    executor = LocalPythonExecutor(ALLOWED_IMPORTS, max_print_outputs_length=MAX_OUTPUT_CHARS, timeout_seconds=None)
    tools: dict[str, Any] = {  # the two helpers that the official environment offers to programs
        "format_exc": traceback.format_exc,
        "safe_json_dumps": lambda value: json.dumps(value, default=repr),
    }
    executor.send_tools(tools)
    random.seed(seed)
    os.dup2(1, 2)  # a nursery's stdout is /dev/null
    confine()

    def answer(code: str) -> dict[str, Any]:
        set_clocks(CPU_LIMIT_S, WALL_LIMIT_S)
        outcome = run_program(executor, code)
        set_clocks(0, 0)
        return outcome

    return answer


def run_program(executor: LocalPythonExecutor, code: str) -> dict[str, Any]:
    """Return the output of a program: what it printed, then the value of its last statement as JSON.

    An exception of a program becomes InterpreterError, except for those that end a process; any other kind of exception
    ends the worker.
    """
    try:
        result = executor(code)
        parts = [result.logs] if result.logs else []
        if result.output is not None:
            parts.append(_as_text(result.output))
        return {"stdout": capped("\n".join(parts)), "stderr": "", "exit_code": 0}
    except (InterpreterError, MemoryError, RecursionError, SystemExit, KeyboardInterrupt) as error:
        return {"stdout": "", "stderr": capped(f"{type(error).__name__}: {error}"), "exit_code": 1}


def set_clocks(cpu_s: float, wall_s: float) -> None:
    """Set timers whose signals (SIGPROF, SIGALRM) kill this process, even within C code. 0 stops a timer."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def _as_text(value: Any) -> str:
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return json.dumps(value)
    return repr(value)
