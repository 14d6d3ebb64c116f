"""The description of a run: what it is, and each of its starts with command, commit, versions, machine and end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from skyrl_train.files import write_whole
from skyrl_train.run.records.provenance import command_line, commits, machine, masked, masked_value, versions
from skyrl_train.run.run_folder import RUN_INFO, writing_process
from skyrl_train.visible import shortened, visible

FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"  # how a start ended
RUNNING, KILLED = "running", "killed"  # no end is written: the process still works, or nobody saw it end
MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class Start:
    """One process that worked on the run. Times are those of the clock on the wall, with their zone."""

    started: str
    command: str
    folder: str  # the current one of the process
    first_step: int  # the step before its first
    commits: dict[str, str]
    versions: dict[str, str]
    machine: str
    process: int
    ended: str | None = None  # FINISHED, INTERRUPTED, FAILED; None: it works, or was killed
    ended_at: str | None = None
    error: str | None = None  # the last line

    @classmethod
    def now(cls, first_step: int) -> Start:
        place = os.getcwd(), first_step, commits(), versions(), machine(), os.getpid()
        return cls(clock_now(), command_line(), *place)


@dataclass(frozen=True)
class RunInfo:
    """Model, environment and settings of a run. changed: settings that differ from their defaults, [value, default]."""

    model: str = "a model"
    environment: str = "an environment"
    device: str = ""
    total_steps: int | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)
    name: str = ""
    starts: list[dict[str, Any]] = field(default_factory=list)  # of Start, the first one first

    @property
    def model_name(self) -> str:
        """Return a hub name as it is, and of a folder on this machine its last part."""
        return Path(self.model).name if self.model.startswith(("/", "~", ".")) else self.model


def run_name(info: RunInfo) -> str:
    """Return a name for a run that was given none: "echo_env-SmolLM2-135M-Instruct-2026-11-27-1659"."""
    environments = [re.split(r"[/:]", name)[-1] for name in info.environment.split(", ")]
    environment = environments[0] if len(environments) == 1 else f"{len(environments)}_environments"
    when = f"{datetime.now():%Y-%m-%d-%H%M}"
    return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in (environment, Path(info.model).name, when))


@contextmanager
def recorded_start(run_folder: Path, info: RunInfo, first_step: int) -> Generator[None]:
    """Write run.json with one start more, and at the end of the block how that ended."""
    start = Start.now(first_step)
    write_run_info(run_folder, replace(info, starts=[*info.starts, asdict(start)]))

    def ended(how: str, error: str | None = None) -> None:
        done = replace(start, ended=how, ended_at=clock_now(), error=error)
        with suppress(OSError):  # a full disk, which the error on its way says better
            write_run_info(run_folder, replace(info, starts=[*info.starts, asdict(done)]))

    try:
        yield
    except BaseException as error:
        is_failure = isinstance(error, Exception)  # neither Ctrl-C nor a cancelled task
        ended(FAILED if is_failure else INTERRUPTED, last_line(error) if is_failure else None)
        raise
    ended(FINISHED)


def last_line(error: BaseException) -> str:
    """Return the kind of an error and the last line of what it says, without secrets."""
    lines = str(error).strip().splitlines() or [""]
    return shortened(masked(visible(f"{type(error).__name__}: {lines[-1].strip()}".rstrip(": "))), MAX_ERROR_CHARS)


def state_of(run_folder: Path | str, info: RunInfo) -> str:
    """Return how the run's latest start ended, RUNNING or KILLED; "" for a run that recorded none."""
    if not info.starts:
        return ""
    if info.starts[-1].get("ended"):
        return str(info.starts[-1]["ended"])
    return RUNNING if writing_process(Path(run_folder)) is not None else KILLED


def clock_now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def write_run_info(run_folder: Path | str, info: RunInfo) -> None:
    write_whole(Path(run_folder) / RUN_INFO, json.dumps(asdict(info), indent=2, default=str).encode())


def read_run_info(run_folder: Path | str) -> RunInfo:
    """Return the description of the run, or a general one if the file is missing. ValueError if it is damaged.

    A field of a later version is left out.
    """
    path = Path(run_folder) / RUN_INFO
    if not path.exists():
        return RunInfo()
    try:
        known = {one.name for one in fields(RunInfo)}
        written = json.loads(path.read_bytes())
        return _checked(RunInfo(**{name: value for name, value in written.items() if name in known}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, the report is written without it") from error


def _checked(info: RunInfo) -> RunInfo:
    """Return the description as it is. TypeError if a value is of another kind, as in another program's run.json."""
    texts = (info.model, info.environment, info.device, info.name)
    if not all(isinstance(text, str) for text in texts) or not isinstance(info.total_steps, int | None):
        raise TypeError("a text or a number of another kind")
    if not isinstance(info.changed, dict) or not all(isinstance(pair, list) for pair in info.changed.values()):
        raise TypeError("changed settings of another kind")
    if not isinstance(info.starts, list) or not all(isinstance(start, dict) for start in info.starts):
        raise TypeError("starts of another kind")
    return info


def changed_settings(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the settings that differ: {"trainer.seed": 1}, {"trainer.seed": 42} -> {"trainer.seed": [1, 42]}.

    Secrets among them are masked.
    """
    return {
        key: [masked_value(key, value), masked_value(key, defaults.get(key))]
        for key, value in sorted(config.items())
        if value != defaults.get(key)
    }
