"""What a run is: written once at its start, so that report and summary can say it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.files import write_whole
from skyrl_train.run.run_folder import RUN_INFO


@dataclass(frozen=True)
class RunInfo:
    """changed: flat settings that differ from their defaults, key -> [value, default]."""

    model: str = "a model"
    environment: str = "an environment"
    device: str = ""
    total_steps: int | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """A hub name as it is; of a folder on this machine its last part."""
        return Path(self.model).name if self.model.startswith(("/", "~", ".")) else self.model


def write_run_info(run_folder: Path | str, info: RunInfo) -> None:
    write_whole(Path(run_folder) / RUN_INFO, json.dumps(asdict(info), indent=2, default=str).encode())


def read_run_info(run_folder: Path | str) -> RunInfo:
    """Without the file: words that fit any run. ValueError if it is damaged."""
    path = Path(run_folder) / RUN_INFO
    if not path.exists():
        return RunInfo()
    try:
        return RunInfo(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, the report is written without it") from error


def changed_settings(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, list[Any]]:
    """{"trainer.seed": 1}, {"trainer.seed": 42} -> {"trainer.seed": [1, 42]}; both flat."""
    return {key: [value, defaults.get(key)] for key, value in sorted(config.items()) if value != defaults.get(key)}
