"""The python tool: run a program, answer with what it printed."""

from __future__ import annotations

from skyrl_gym.tools.core import ToolGroup, tool
from skyrl_gym.tools.python_process import require_wall, run_python


class PythonCodeExecutorToolGroup(ToolGroup):
    """Python programs in processes of their own, behind a wall (see python_process). NoWall where there is none."""

    def __init__(self, timeout: float = 10.0) -> None:
        require_wall()
        self.timeout = timeout
        super().__init__(name="PythonCodeExecutorToolGroup")

    @tool
    def python(self, code: str) -> str:
        """Stdout, with stderr behind it if there is any (a warning hides no output); or the error, then stdout."""
        result = run_python(code, timeout_s=self.timeout)
        stdout, stderr = result.stdout.strip(), result.stderr.strip()
        if result.timed_out:
            return _error(f"Execution timed out after {self.timeout} seconds.", stdout)
        if result.exit_code:
            return _error(stderr or f"exit code {result.exit_code}", stdout)
        return f"{stdout}\nstderr:\n{stderr}".lstrip("\n") if stderr else stdout


def _error(words: str, stdout: str) -> str:
    return f"Error executing Python code: {words}" + (f"\nOutput before the error:\n{stdout}" if stdout else "")
