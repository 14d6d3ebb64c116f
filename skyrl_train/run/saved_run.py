"""A run as it lies on the disk, read for its model and its settings: finished, stopped or killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.files import user_path
from skyrl_train.run.checkpoint import LEARNER, checkpoint_step, read_checkpoint, whole_before
from skyrl_train.run.contents import Contents, changed_contents, model_contents
from skyrl_train.run.digests import DIGESTS, Damaged
from skyrl_train.run.held import HeldCheckpoint
from skyrl_train.run.run_folder import (
    CHECKPOINT_NAME,
    METRICS,
    MODEL,
    ORIGIN,
    RUN_INFO,
    checkpoint_steps,
    where_its_run_is,
    writing_process,
)

MODEL_PATH = "trainer.policy.model.path"


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run: its step, the settings (flat) and digests of inputs, and the learner's folder."""

    folder: Path
    step: int
    settings: dict[str, Any]
    contents: Contents
    learner: Path
    held: HeldCheckpoint | None = field(default=None, repr=False, compare=False)

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

    The run may go on meanwhile: its trainer keeps the checkpoint as long as the SavedRun is there.
    ValueError, in one line, for what is no run, has no checkpoint, or is damaged.
    """
    folder = user_path(folder)
    if CHECKPOINT_NAME.fullmatch(folder.name) and folder.is_dir() and step is None:
        folder, step = folder.parent, checkpoint_step(folder)
    path, held = _held_checkpoint(folder, step)
    try:
        found, state = read_checkpoint(path)
    except Damaged as error:
        raise ValueError(f"{error}. {_instead(path)}") from error
    saved = state["trainer_state"]
    return SavedRun(folder, found, saved.get("config", {}), saved.get("contents", {}), path / LEARNER, held)


def _held_checkpoint(folder: Path, step: int | None) -> tuple[Path, HeldCheckpoint | None]:
    """Return the folder of a checkpoint, kept from being removed. The newest one may go while it is looked for."""
    while True:
        if not (steps := checkpoint_steps(folder) if folder.is_dir() else []):
            raise ValueError(_without_checkpoint(folder))
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise ValueError(f"the run in {folder} has no checkpoint of step {step}; it has {there}")
        path = folder / f"global_step_{steps[-1] if step is None else step}"
        try:
            return path, HeldCheckpoint(path)
        except FileNotFoundError:
            if path.is_dir() and not (path / DIGESTS).exists():
                return path, None  # damaged, which reading it says


def _without_checkpoint(folder: Path) -> str:
    """Return why there is no checkpoint in a place, and what to do."""
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is no such folder"
        return f"{folder} is no run: {what}{where_its_run_is(folder)}"
    if (folder / ORIGIN).is_file():
        return f"{folder} is a run's exported model, without a checkpoint{where_its_run_is(folder)}"
    if not any((folder / name).exists() for name in (RUN_INFO, METRICS)):
        name_it = where_its_run_is(folder) or " (name the run's folder, trainer.ckpt_path)"
        return f"{folder} is no run: it holds no checkpoint{name_it}"
    if (process := writing_process(folder)) is not None:
        return (
            f"the run in {folder} has no checkpoint yet: process {process} is at work in it, and writes one every "
            "trainer.ckpt_interval steps"
        )
    if (folder / MODEL / ORIGIN).is_file():
        return f"the run in {folder} has no checkpoint any more; its model is in {folder / MODEL}"
    return f"the run in {folder} has no checkpoint, so its model was not kept (trainer.ckpt_interval)"


def _instead(damaged: Path) -> str:
    """Return what can be read where this checkpoint cannot."""
    if (path := whole_before(damaged)) is not None:
        return f"{path.name} before it is whole: add --step {checkpoint_step(path)}"
    if (damaged.parent / MODEL / ORIGIN).is_file():
        return f"No checkpoint before it is whole; the model that the run exported is in {damaged.parent / MODEL}"
    return "No checkpoint before it is whole"
