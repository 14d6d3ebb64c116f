"""The python tool: it runs a program and returns what the program printed."""

from __future__ import annotations

from skyrl_gym.tools.core import ToolGroup, tool
from skyrl_gym.tools.python_process import require_wall, run_python


class PythonCodeExecutorToolGroup(ToolGroup):
    """Tool that runs each Python program in its own sandboxed process (see python_process).

    NoWall: this machine has no sandbox and nobody accepted that.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        require_wall()
        self.timeout = timeout
        super().__init__(name="PythonCodeExecutorToolGroup")

    @tool
    def python(self, code: str) -> str:
        """Run the program; return stdout, then stderr if there is any. After a failure the error comes first."""
        result = run_python(code, timeout_s=self.timeout)
        stdout, stderr = result.stdout.strip(), result.stderr.strip()
        if result.timed_out:
            return _error(f"Execution timed out after {self.timeout} seconds.", stdout)
        if result.exit_code:
            return _error(stderr or f"exit code {result.exit_code}", stdout)
        return f"{stdout}\nstderr:\n{stderr}".lstrip("\n") if stderr else stdout


def _error(words: str, stdout: str) -> str:
    return f"Error executing Python code: {words}" + (f"\nOutput before the error:\n{stdout}" if stdout else "")
