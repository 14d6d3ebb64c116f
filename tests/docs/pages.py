"""A page of docs/ as something to type: its files by name, and its commands in order."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = re.compile(r"`(?P<name>[\w/]+\.py)`[^`]*?\n\n?```python\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """Files of the page (name -> text) and the commands that are indented by four spaces."""

    files: dict[str, str]
    commands: list[str]

    @classmethod
    def read(cls, name: str) -> Page:
        text = (ROOT / "docs" / name).read_text()
        outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        commands = [line.strip() for line in outside.splitlines() if line.startswith("    ")]
        return cls({found["name"]: found["text"] for found in FILE.finditer(text)}, commands)

    def write_files(self, folder: Path, **replaced: str) -> None:
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for old, new in replaced.items():
                text = text.replace(old, new)
            path.write_text(text)


def words_of(command: str) -> list[str]:
    """Return the words of a command. `skyrl` and `openenv` are run as modules, which needs no installed script."""
    program, *arguments = shlex.split(command)
    module = {"skyrl": "skyrl_train", "openenv": "openenv.cli"}.get(program)
    return [program, *arguments] if module is None else ["python", "-m", module, *arguments]


def typed(command: str, folder: Path, *more: str, lines: str = "") -> str:
    """Run a command of a page in the folder, with `more` arguments at its end; return what it printed."""
    program, *arguments = words_of(command)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(
        [str(scripts / program), *arguments, *more],
        cwd=folder, env=environment, input=lines, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def typed_here(command: str, folder: Path, *more: str, lines: str = "") -> None:
    """Run `python -m MODULE ...` or `python FILE` in this process, which has torch loaded already."""
    _, *arguments = [*words_of(command), *more]
    is_module = arguments[0] == "-m"
    modules, path, argv, stdin = set(sys.modules), list(sys.path), sys.argv, sys.stdin
    sys.path.insert(0, str(folder))
    sys.argv, sys.stdin = arguments[is_module:], io.StringIO(lines)
    try:
        with contextlib.chdir(folder):
            if is_module:
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{command} ended with {end.code}") from end
    finally:
        sys.path[:], sys.argv, sys.stdin = path, argv, stdin
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
