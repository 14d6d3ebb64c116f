"""A run as it lies on the disk, read for its model and its settings: finished, stopped or killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_train.files import user_path
from skyrl_train.run.checkpoint import LEARNER, Checkpoints, checkpoint_step
from skyrl_train.run.contents import Contents, changed_contents, model_contents
from skyrl_train.run.run_folder import CHECKPOINT_NAME, METRICS, RUN_INFO, checkpoint_steps

MODEL_PATH = "trainer.policy.model.path"


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run: its step, the settings (flat) and digests of inputs, and the learner's folder."""

    folder: Path
    step: int
    settings: dict[str, Any]
    contents: Contents
    learner: Path

    @property
    def lora_rank(self) -> int:
        return int(self.settings.get("trainer.policy.model.lora.rank", 0))

    def base_model(self, folder: Path | str | None = None) -> Path:
        """Return the folder of the model that the run began with. ValueError unless its files are still the same.

        folder: where it lies by now; None: where the settings say.
        """
        from skyrl_train.policy.pretrained import resolve_model

        path = resolve_model(str(folder or self.settings[MODEL_PATH]))
        began_with = {MODEL_PATH: self.contents.get(MODEL_PATH, {})}
        if changed := changed_contents(
            began_with, {MODEL_PATH: model_contents(path)} if began_with[MODEL_PATH] else {}
        ):
            raise ValueError(
                f"{path} is not the model that the run in {self.folder} began with: {changed[MODEL_PATH]}; put the "
                "model back, or name its folder with --base"
            )
        return path


def read_run(folder: Path | str, step: int | None = None) -> SavedRun:
    """Return the newest checkpoint of a run, or that of `step`. The folder may also be a `global_step_N` itself.

    ValueError, in one line, for what is no run, has no checkpoint, or is damaged.
    """
    folder = user_path(folder)
    if CHECKPOINT_NAME.fullmatch(folder.name) and folder.is_dir() and step is None:
        folder, step = folder.parent, checkpoint_step(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run: there is no such folder")
    steps = checkpoint_steps(folder)
    if not steps:
        if any((folder / name).exists() for name in (RUN_INFO, METRICS)):
            raise ValueError(
                f"the run in {folder} has no checkpoint, so its model was not kept (trainer.ckpt_interval)"
            )
        raise ValueError(f"{folder} is no run: it holds no checkpoint (name the run's folder, trainer.ckpt_path)")
    if step is not None and step not in steps:
        raise ValueError(f"the run in {folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    checkpoints = Checkpoints(folder)
    path = checkpoints.path(steps[-1] if step is None else step)
    found, state = checkpoints.load(path)
    saved = state["trainer_state"]
    return SavedRun(folder, found, saved.get("config", {}), saved.get("contents", {}), path / LEARNER)
