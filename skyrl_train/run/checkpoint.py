"""Checkpoints: everything a step depends on, written so that a kill at any moment leaves a usable newest one.

    {folder}/global_step_N/digests.txt                  the format, and the digest of every other file
                           trainer_state.safetensors    global_step, config and contents, random states, counters
                           policy/index.json            what the learner wrote (learner/saved.py): an index,
                           policy/rank_0_of_1.safetensors   and a file of each rank
    {folder}/latest_ckpt_global_step.txt                N, written after the folder is complete

The learner's files are written while the next step runs (learner/saved.py), and so is what follows here. A folder gets
its name once all of it is on the disk. So one that lacks a file, or whose file is not what its digest says, is
damaged: it is refused and never passed over, and the newest whole one before it is named. No file holds anything but
tensors and plain data: opening a checkpoint runs no code.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from skyrl_train.files import remove_leftovers, whole_folder, write_whole
from skyrl_train.learner.saved import refuse_incomplete
from skyrl_train.run.checkpoint_parts import SUFFIX, read_part, write_part
from skyrl_train.run.digests import DIGESTS, Damaged, check_digests, read_digests, write_digests
from skyrl_train.run.held import remove_unless_held
from skyrl_train.run.run_folder import CHECKPOINT_NAME, LATEST, checkpoint_steps

State = dict[str, Any]  # "trainer_state" and other parts: tensors and plain data
LEARNER = "policy"  # the folder that the learner writes and reads
FORMAT = 3  # format 1 held pickles, format 2 the learner's state in one file that one process wrote
_HEADER = "# skyrl checkpoint, format {}"


class Checkpoints:
    """The checkpoints of one run. `max_to_keep` below 0 keeps all."""

    def __init__(self, folder: Path | str, max_to_keep: int = -1) -> None:
        if max_to_keep == 0:
            raise ValueError("trainer.max_ckpts_to_keep=0 would keep no checkpoint; use -1 for all, N for the newest N")
        self.folder = Path(folder)
        self.max_to_keep = max_to_keep

    def save(self, step: int, state: State, save_learner: Callable[[Path], None] | None = None) -> Path:
        """Write `global_step_{step}`. A step that is already saved is not written again.

        `save_learner` writes into the folder that it is given, and returns when every rank is done. Ranks of several
        machines therefore need a checkpoint folder that all machines share.
        """
        path = self.path(step)
        if (path / DIGESTS).is_file():
            return path
        if "trainer_state" not in state:
            raise ValueError(f"a checkpoint needs 'trainer_state', got {sorted(state)}")
        state = state | {"trainer_state": {"global_step": step, **state["trainer_state"]}}
        if state["trainer_state"]["global_step"] != step:
            raise ValueError(f"trainer_state says step {state['trainer_state']['global_step']}, save() says {step}")
        with whole_folder(path) as unfinished:
            for name, value in state.items():
                write_part(value, unfinished / f"{name}{SUFFIX}")
            if save_learner is not None:
                save_learner(unfinished / LEARNER)
                refuse_incomplete(unfinished / LEARNER)
            write_digests(unfinished, _HEADER.format(FORMAT))
        write_whole(self.folder / LATEST, str(step).encode())
        self._remove_old()
        return path

    def latest(self) -> int | None:
        """Return the newest checkpoint's step. The text file is a hint: a kill may come between folder and file."""
        newest = max(checkpoint_steps(self.folder), default=None)
        hint = self._hint()
        if hint is not None and newest is not None and hint != str(newest):
            logger.warning(
                f"{self.folder / LATEST} says {hint!r}; going by the newest checkpoint, global_step_{newest}"
            )
        return newest

    def load(self, which: int | Path) -> tuple[int, State]:
        """Return step and state of a step of this run, or of any `global_step_N` folder. Tensors come back on the CPU.

        What the learner wrote is checked and left in its folder, where every rank reads it. Raises ValueError if the
        checkpoint is damaged or of another format; the message names the file and what to resume from.
        """
        path = self.path(which) if isinstance(which, int) else which
        try:
            return read_checkpoint(path)
        except Damaged as error:
            raise ValueError(f"{error}. {_other_checkpoint(path)}") from error

    def path(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    def remove_leftovers(self) -> list[Path]:
        """Remove incomplete folders of killed saves; only the process that holds the run's lock may call this."""
        return remove_leftovers(self.folder)

    def _hint(self) -> str | None:
        try:
            return (self.folder / LATEST).read_text(encoding="utf-8", errors="backslashreplace").strip()
        except FileNotFoundError:
            return None

    def _remove_old(self) -> None:
        if self.max_to_keep > 0:
            for step in checkpoint_steps(self.folder)[: -self.max_to_keep]:
                remove_unless_held(self.path(step))


def read_checkpoint(path: Path) -> tuple[int, State]:
    """Return step and state of a `global_step_N` folder. Raises Damaged, with the name of the file."""
    step = checkpoint_step(path)
    state = {name.removesuffix(SUFFIX): read_part(path / name) for name in whole_parts(path)}
    written = state["trainer_state"].get("global_step")
    if written != step:
        logger.warning(f"{path} was written at step {written}; the folder's name wins: step {step}")
        state["trainer_state"] = {**state["trainer_state"], "global_step": step}
    return step, state


def checkpoint_step(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder. Errors say what is wrong with the folder."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not a checkpoint: the folder's name must be global_step_<number>")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {path}")
    return int(match[1])


def whole_parts(path: Path) -> list[str]:
    """Return the names of a checkpoint's parts. Raises Damaged unless every file is as it was written."""
    if (path / "trainer_state.pt").exists() and not (path / DIGESTS).exists():
        raise Damaged(_of_another_version(path, 1))
    header, digests = read_digests(path)
    if header != _HEADER.format(FORMAT):
        other = re.fullmatch(_HEADER.format(r"(\d+)"), header)
        raise Damaged(_of_another_version(path, int(other[1])) if other else f"{path / DIGESTS} is damaged")
    check_digests(path, digests, SUFFIX)
    if f"trainer_state{SUFFIX}" not in digests:
        raise Damaged(f"{path / f'trainer_state{SUFFIX}'} is missing")
    return [name for name in digests if name.endswith(SUFFIX) and not name.startswith(f"{LEARNER}/")]


def _of_another_version(path: Path, found: int) -> str:
    age = "an earlier" if found < FORMAT else "a later"
    return f"{path} has format {found}, of {age} version of this program; this one reads format {FORMAT}"


def _other_checkpoint(damaged: Path) -> str:
    """Return what to do instead of resuming from this one: the newest whole checkpoint before it, or a new start."""
    if (path := whole_before(damaged)) is not None:
        return (
            f"{path.name} before it is whole: go on from there with trainer.resume_mode=from_path "
            f"trainer.resume_path={path} (what came after it is moved aside, not deleted)"
        )
    return (
        f"No earlier checkpoint in {damaged.parent} is whole: name another one with trainer.resume_mode=from_path "
        "trainer.resume_path=<global_step_N folder>, or start afresh with trainer.resume_mode=none (the run is moved "
        "aside, not deleted)"
    )


def whole_before(damaged: Path) -> Path | None:
    """Return the newest whole checkpoint of the same run before this one; None if there is none."""
    for step in reversed(checkpoint_steps(damaged.parent)):
        path = damaged.with_name(f"global_step_{step}")
        if path.name == damaged.name or step > checkpoint_step(damaged):
            continue
        try:
            whole_parts(path)
        except (Damaged, OSError):
            continue
        return path
    return None


def random_states() -> dict[str, Any]:
    """Return the state of every global random generator, as plain data."""
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set every global random generator to a state that `random_states` returned."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
