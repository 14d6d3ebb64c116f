"""Trackers that get the metrics beside `metrics.jsonl`: terminal, TensorBoard, wandb and others, without an account."""

from __future__ import annotations

import importlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from loguru import logger

from skyrl_train.log_style import WIDTH
from skyrl_train.run.metrics import Metrics
from skyrl_train.run.progress import print_line, step_line
from skyrl_train.run.run_folder import TENSORBOARD

Config = dict[str, Any]


class Tracker(Protocol):
    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Return the exceptions of a backend that is out of reach."""
        ...

    def log(self, data: Metrics, step: int) -> None: ...
    def close(self) -> None: ...


# Connections and files fail with OSError (requests' errors are OSErrors too); clients use the two others as well.
COMMON_ERRORS = (OSError, RuntimeError, ValueError)


class Tracking:
    """Sends every step's metrics to the chosen backends.

    A backend that cannot start raises here, before training. One that fails later is reported once, counted in
    `failures`, and never ends the run: `metrics.jsonl` has every number anyway.
    """

    supported_backends = ("console", "tensorboard", "wandb", "mlflow", "trackio", "swanlab")

    def __init__(
        self,
        project_name: str,
        experiment_name: str,
        backends: str | Iterable[str] = "console",
        config: Config | None = None,
        *,
        folder: Path | str = ".",
        resumed_at: int = 0,
    ) -> None:
        """folder: the run's, for backends that write files. resumed_at: the step after which the run goes on."""
        self.failures: dict[str, int] = {}
        self.trackers: dict[str, Tracker] = {}
        self.waiting: dict[int, Metrics] = {}
        for name in backend_names(backends):
            make = _MAKERS[name]
            self.trackers[name] = make(project_name, experiment_name, config or {}, Path(folder), resumed_at)

    def log(self, data: Metrics, step: int, commit: bool = False) -> None:
        """Collect the metrics of a step; they are sent together when `commit` is set or a later step arrives."""
        for earlier in [s for s in self.waiting if s != step]:
            self._send(earlier)
        self.waiting.setdefault(step, {}).update(data)
        if commit:
            self._send(step)

    def close(self) -> None:
        for step in list(self.waiting):
            self._send(step)
        for name, tracker in self.trackers.items():
            self._guarded(name, tracker.close)

    def _send(self, step: int) -> None:
        data = self.waiting.pop(step)
        for name, tracker in self.trackers.items():
            self._guarded(name, lambda tracker=tracker: tracker.log(data, step))

    def _guarded(self, name: str, send: Callable[[], None]) -> None:
        try:
            send()
        except self.trackers[name].errors as error:
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] == 1:
                logger.warning(f"tracker {name} failed ({type(error).__name__}: {error}); training goes on without it")


def backend_names(backends: str | Iterable[str]) -> list[str]:
    """Return the names as a list: "console, wandb" -> ["console", "wandb"]. ValueError for an unknown name."""
    names = backends.split(",") if isinstance(backends, str) else list(backends)
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    for name in names:
        if name not in Tracking.supported_backends:
            raise ValueError(f"trainer.logger={name!r} is not one of {', '.join(Tracking.supported_backends)}")
    return names


class ConsoleTracker:
    """Prints a line per step."""

    errors = (OSError,)

    def __init__(self, project: str, experiment: str, config: Config, folder: Path, resumed_at: int) -> None: ...

    def log(self, data: Metrics, step: int) -> None:
        print_line(step_line(step, data, width=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)))

    def close(self) -> None: ...


class TensorboardTracker:
    """Writes event files in `{run folder}/tensorboard`, or TENSORBOARD_DIR."""

    errors = COMMON_ERRORS

    def __init__(self, project: str, experiment: str, config: Config, folder: Path, resumed_at: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        place = os.environ.get("TENSORBOARD_DIR") or str(folder / TENSORBOARD)
        self.usual_hook = threading.excepthook
        threading.excepthook = self._hook
        # Steps that are played again after a resume replace those recorded before.
        self.writer = writer(place, purge_step=resumed_at + 1 if resumed_at else None)

    def log(self, data: Metrics, step: int) -> None:
        for key, value in data.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        try:
            self.writer.close()
        finally:
            threading.excepthook = self.usual_hook

    def _hook(self, failed: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: the next call raises what it met, a full disk for instance."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self.usual_hook(failed)


class WandbTracker:
    def __init__(self, project: str, experiment: str, config: Config, folder: Path, resumed_at: int) -> None:
        wandb = _package("wandb")
        self.errors = (*COMMON_ERRORS, wandb.Error)
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.api.api_key:
            mode = "offline"
            logger.info(f"wandb: no API key, so this run is kept offline in {folder / 'wandb'} (wandb sync sends it)")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, name=experiment, config=config, dir=str(folder), mode=mode)

    def log(self, data: Metrics, step: int) -> None:
        self.run.log(data, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowTracker:
    """Logs to MLFlow: a project is an experiment. Without MLFLOW_TRACKING_URI it writes into the run's folder."""

    def __init__(self, project: str, experiment: str, config: Config, folder: Path, resumed_at: int) -> None:
        self.mlflow = _package("mlflow")
        self.errors = (*COMMON_ERRORS, self.mlflow.MlflowException)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            folder.mkdir(parents=True, exist_ok=True)
            self.mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self.mlflow.set_experiment(project)
        self.mlflow.start_run(run_name=experiment)
        # MLFlow allows no "@" in a name
        self.mlflow.log_params({key.replace("@", "_at_"): str(value)[:500] for key, value in config.items()})

    def log(self, data: Metrics, step: int) -> None:
        self.mlflow.log_metrics({key.replace("@", "_at_"): float(value) for key, value in data.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class TrackioTracker:
    """Logs to trackio on this machine: `trackio show` opens the dashboard."""

    errors = (*COMMON_ERRORS, sqlite3.Error)

    def __init__(self, project: str, experiment: str, config: Config, folder: Path, resumed_at: int) -> None:
        self.run = _package("trackio").init(project=project, name=experiment, config=config)

    def log(self, data: Metrics, step: int) -> None:
        self.run.log(data, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanlabTracker:
    errors = COMMON_ERRORS

    def __init__(self, project: str, experiment: str, config: Config, folder: Path, resumed_at: int) -> None:
        key = os.environ.get("SWANLAB_API_KEY")
        mode = os.environ.get("SWANLAB_MODE") or ("cloud" if key else "offline")
        logdir = os.environ.get("SWANLAB_LOG_DIR") or str(folder / "swanlog")
        self.swanlab = _package("swanlab")
        if mode == "offline":
            logger.info(f"swanlab: no API key, so this run is kept offline in {logdir} (swanlab sync sends it)")
        elif key:
            self.swanlab.login(api_key=key)
        self.swanlab.init(project=project, experiment_name=experiment, config=config, logdir=logdir, mode=mode)

    def log(self, data: Metrics, step: int) -> None:
        self.swanlab.log(data, step=step)

    def close(self) -> None:
        self.swanlab.finish()


_MAKERS = {
    "console": ConsoleTracker,
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "swanlab": SwanlabTracker,
}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"trainer.logger={name} needs the package {name}: run with `uv run --extra trackers ...` "
            f"or `pip install {name}`, or choose trainer.logger=console or tensorboard"
        ) from error
