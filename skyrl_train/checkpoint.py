"""Checkpoints: everything a step depends on, written so that a kill at any moment leaves a usable newest one.

    {folder}/global_step_N/trainer_state.pt     global_step, config as a plain dictionary, random states, counters
                           data.pt              position in the data
                           policy/model.pt ...  whatever else the caller names
    {folder}/latest_ckpt_global_step.txt        N, written after the folder is complete

Files hold tensors and plain data only, so they load with `weights_only=True`: opening a checkpoint runs no code.
"""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from skyrl_train.records.files import remove_folder, remove_leftovers, whole_folder, write_whole
from skyrl_train.records.run_folder import CHECKPOINT_NAME, LATEST, checkpoint_steps

State = dict[str, Any]  # "trainer_state", "data", "policy/model", ... -> tensors and plain data


class Checkpoints:
    """The checkpoints of one run. `max_to_keep` below 0 keeps all."""

    def __init__(self, folder: Path | str, max_to_keep: int = -1) -> None:
        if max_to_keep == 0:
            raise ValueError("trainer.max_ckpts_to_keep=0 would keep no checkpoint; use -1 for all, N for the newest N")
        self.folder = Path(folder)
        self.max_to_keep = max_to_keep

    def save(self, step: int, state: State) -> Path:
        """Write `global_step_{step}`. A step that is already saved is not written again."""
        path = self.path(step)
        if (path / "trainer_state.pt").is_file():
            return path
        if "trainer_state" not in state:
            raise ValueError(f"a checkpoint needs 'trainer_state', got {sorted(state)}")
        state = state | {"trainer_state": {"global_step": step, **state["trainer_state"]}}
        if state["trainer_state"]["global_step"] != step:
            raise ValueError(f"trainer_state says step {state['trainer_state']['global_step']}, save() says {step}")
        with whole_folder(path) as unfinished:
            for name, value in state.items():
                _refuse_objects(value, name)
                target = unfinished / f"{name}.pt"
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(value, target)
        write_whole(self.folder / LATEST, str(step).encode())
        self._remove_old()
        return path

    def latest(self) -> int | None:
        """The newest complete checkpoint. The text file is only a hint: a kill may come between folder and file."""
        newest = max(checkpoint_steps(self.folder), default=None)
        hint = self._hint()
        if hint is not None and newest is not None and hint != newest:
            order = "ahead of" if hint > newest else "behind"
            logger.warning(f"{LATEST} says {hint}, {order} the newest complete checkpoint; using global_step_{newest}")
        return newest

    def load(self, which: int | Path) -> tuple[int, State]:
        """Step and state of a step of this run, or of any `global_step_N` folder. Tensors come back on the CPU."""
        path = self.path(which) if isinstance(which, int) else which
        step = checkpoint_step(path)
        state = {p.relative_to(path).with_suffix("").as_posix(): _read(p, path) for p in sorted(path.rglob("*.pt"))}
        written = state["trainer_state"].get("global_step")
        if written != step:
            logger.warning(f"{path} was written at step {written}; the folder's name wins: resuming at step {step}")
            state["trainer_state"] = {**state["trainer_state"], "global_step": step}
        return step, state

    def path(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    def remove_leftovers(self) -> list[Path]:
        """Remove what killed saves left; only the process that holds the run's lock may call this."""
        return remove_leftovers(self.folder)

    def _hint(self) -> int | None:
        try:
            text = (self.folder / LATEST).read_text().strip()
        except FileNotFoundError:
            return None
        return int(text) if text.isdigit() else None

    def _remove_old(self) -> None:
        if self.max_to_keep > 0:
            for step in checkpoint_steps(self.folder)[: -self.max_to_keep]:
                remove_folder(self.path(step))


def checkpoint_step(path: Path) -> int:
    """The step in the name of a complete checkpoint folder; errors say what is wrong with the folder."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not a checkpoint: the folder's name must be global_step_<number>")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {path}")
    if not (path / "trainer_state.pt").is_file():
        raise FileNotFoundError(f"{path} holds no trainer_state.pt, so it is not a complete checkpoint")
    return int(match[1])


def random_states() -> dict[str, Any]:
    """The state of every global random generator, as plain data."""
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Undo of `random_states`."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _refuse_objects(value: Any, where: str) -> None:
    """Raise if loading `value` would need more than tensors and plain data; `where` is the path to it."""
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"checkpoint: a key of {where} is a {type(key).__name__} ({key!r}); use str or int")
            _refuse_objects(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _refuse_objects(item, f"{where}[{i}]")
    else:
        raise TypeError(f"checkpoint: {where} is a {type(value).__name__}; only tensors and plain data can be saved")


def _write(value: Any, path: Path) -> None:
    """Without checksums, which torch.load does not look at and which take longer than the writing."""
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    finally:
        torch.serialization.set_crc32_options(checksums)


def _read(path: Path, checkpoint: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or "empty file").splitlines()[0]
        raise ValueError(
            f"{path} cannot be read ({reason}); it is damaged or cut short. Move {checkpoint} away to use an older "
            "checkpoint, or name one with trainer.resume_mode=from_path trainer.resume_path=<global_step_N folder>"
        ) from error
