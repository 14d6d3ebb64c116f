"""The start of a run: fresh, from its newest checkpoint, or from a checkpoint that the user names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.files import user_path
from skyrl_train.run.checkpoint import LEARNER, Checkpoints, State, checkpoint_step
from skyrl_train.run.contents import Contents, changed_contents
from skyrl_train.run.run_folder import move_aside, rewind


@dataclass(frozen=True)
class RunStart:
    """Training goes on at `step + 1`. `notes` are for the user's eyes.

    A fresh start has an empty `state` and no `learner`, the folder that the learner goes on from.
    """

    step: int
    state: State = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    learner: Path | None = None


def start_run(
    checkpoints: Checkpoints,
    resume_mode: str | None,
    resume_path: str | None,
    config: dict[str, Any],
    may_change: Collection[str] = (),
    contents: Contents | None = None,
) -> RunStart:
    """Find and load the checkpoint to start from, and bring the run's folder to the state it had at that step.

    config: flat, "trainer.seed" -> value; it must agree with the checkpoint's but for the keys in `may_change`.
    contents: what the settings that name a file or a folder stand for (contents.py); it must agree, too, and where it
    does, the name may differ. Nothing in the folder is touched before the checkpoint is loaded and agreed with. The
    caller holds the run's lock.
    """
    found = find_checkpoint(checkpoints, resume_mode, resume_path)
    folder = checkpoints.folder
    if found is None:
        checkpoints.remove_leftovers()
        if resume_mode == "latest":
            rewind(folder, None)
            return RunStart(0)
        moved = move_aside(folder)
        return RunStart(0, notes=(f"the earlier run in {folder} was moved to {moved}",) if moved else ())
    step, state = checkpoints.load(found)
    saved = state["trainer_state"]
    then, now = saved.get("contents", {}), contents or {}
    check_same_run(saved.get("config", {}), config, {*may_change, *(then.keys() & now.keys())})
    harmless = check_same_contents(then, now, may_change)
    checkpoints.remove_leftovers()
    notes = [f"resuming after step {step} from {found}", *harmless]
    own = found.resolve().parent == folder.resolve()
    moved = rewind(folder, step) if own else move_aside(folder)
    if moved:
        notes.append(f"what {folder} held {f'after step {step}' if own else 'before'} was moved to {moved}")
    return RunStart(step, state, tuple(notes), found / LEARNER)


def find_checkpoint(checkpoints: Checkpoints, resume_mode: str | None, resume_path: str | None) -> Path | None:
    """Return the checkpoint folder that the mode names, or None for a fresh start."""
    if resume_mode in (None, "none"):
        return None
    if resume_mode == "latest":
        step = checkpoints.latest()
        return None if step is None else checkpoints.path(step)
    if resume_mode != "from_path":
        raise ValueError(f"trainer.resume_mode={resume_mode!r} must be none, latest or from_path")
    if not resume_path:
        raise ValueError("trainer.resume_mode=from_path needs trainer.resume_path=<folder>/global_step_<number>")
    if "://" in resume_path:
        raise ValueError(
            f"trainer.resume_path={resume_path} is a remote address; copy the folder to this machine first"
        )
    path = user_path(resume_path)
    checkpoint_step(path)
    return path


def check_same_run(old: dict[str, Any], new: dict[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise ValueError if a run would go on under other settings than it began with.

    old, new: flat, "trainer.policy.optimizer_config.lr" -> value. A key, or all keys below it, may be in `may_change`.
    """
    missing = "(not set)"
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, missing), new.get(key, missing)
        if _plain(before) != _plain(now) and not _is_at_or_below(key, may_change):
            lines.append(f"  {key}: was {before!r}, is now {now!r}")
    if lines:
        raise ValueError(
            "the checkpoint belongs to a run with other settings:\n" + "\n".join(lines) + "\n"
            "Set them back to go on with that run, start one elsewhere with another trainer.ckpt_path (CKPT_PATH), or "
            "start afresh here with trainer.resume_mode=none (the old run is moved aside, not deleted)"
        )


def order_of_sums(old: dict[str, Any], new: dict[str, Any], keys: Collection[str]) -> list[str]:
    """Return a note if settings have changed on which only the last bits of a run depend, by the order of its sums.

    old, new, keys: as in `check_same_run`. A key that one of the two does not know has not changed.
    """
    changed = [
        f"{key} was {old[key]!r}, is now {new[key]!r}"
        for key in sorted(old.keys() & new.keys())
        if _plain(old[key]) != _plain(new[key]) and _is_at_or_below(key, keys)
    ]
    if not changed:
        return []
    return [
        f"{'; '.join(changed)}: sums may now be added in another order, so the run goes on within rounding, and not "
        "always bit for bit as it would have"
    ]


def check_same_contents(old: Contents, new: Contents, may_change: Collection[str] = ()) -> list[str]:
    """Raise ValueError if a file or folder that a setting names has changed. Return the harmless changes in words."""
    changed = changed_contents(old, new)
    refused = [f"  {key}: {change}" for key, change in changed.items() if key not in may_change]
    if refused:
        raise ValueError(
            "the checkpoint belongs to a run on other files:\n" + "\n".join(refused) + "\n"
            "Put back what the run began with to go on with it, start one elsewhere with another trainer.ckpt_path "
            "(CKPT_PATH), or start afresh here with trainer.resume_mode=none (the old run is moved aside, not deleted)"
        )
    return [f"{key} is not what it was, so compare with care: {change}" for key, change in changed.items()]


def _is_at_or_below(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _plain(value: Any) -> Any:
    """Return lists and tuples as lists: with the same items they are the same setting."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
