"""The row of a run in the table of runs, and the run's own description."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from skyrl_train.run.records.run_info import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING
from skyrl_train.run.records.summary import EVAL_SCORE, TRAIN_REWARD
from skyrl_train.run.run_folder import RUN_INFO
from skyrl_train.view.columns import Columns, thinned
from skyrl_train.view.folders import RunFolder

TOKENS = "generate/num_sampled_tokens"
NEEDED = (EVAL_SCORE, TRAIN_REWARD, TOKENS, "time", "elapsed_s")  # of the metrics: the table asks for no more
SPARK = 60  # points of a sparkline
MAX_INFO = 4_000_000  # bytes of a run.json


def description_of(run: RunFolder) -> tuple[dict[str, Any], str]:
    """Return run.json and what is wrong with it. A missing file is no problem: the run is only described by less."""
    try:
        path = run.file(RUN_INFO)
        if not path.exists():
            return {}, ""
        if path.stat().st_size > MAX_INFO:
            return {}, f"{RUN_INFO} is larger than {MAX_INFO} bytes and was not read"
        found = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        return {}, f"{RUN_INFO} cannot be read: {error}"
    return (found, "") if isinstance(found, dict) else ({}, f"{RUN_INFO} is not an object")


def short_model(model: Any) -> str:
    """Return a hub name as it is, and of a folder its last part."""
    name = str(model or "")
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def state_of(run: RunFolder, description: dict[str, Any], step: int, total: Any) -> str:
    """Return running, or how the newest start ended, as `skyrl runs` says it; finished or stopped if none is known."""
    if run.is_written_now():
        return RUNNING
    starts = description.get("starts")
    if isinstance(starts, list) and starts and isinstance(starts[-1], dict):
        ended = starts[-1].get("ended")
        return KILLED if ended is None else ended if ended in (FINISHED, INTERRUPTED, FAILED) else "stopped"
    return FINISHED if isinstance(total, int) and step >= total else "stopped"


def summary_of(run: RunFolder, description: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the row of a run; numbers that it does not have are None."""
    evals, rewards = columns.series(EVAL_SCORE), columns.series(TRAIN_REWARD)
    times, seconds = columns.series("time"), columns.series("elapsed_s")
    step, total = max(columns.steps, default=0), description.get("total_steps")
    shown = evals if len(evals) > 1 or not rewards else rewards
    tokens = sum(value for _, value in columns.series(TOKENS))
    return {
        "model": short_model(description.get("model")),
        "environment": str(description.get("environment") or ""),
        "device": str(description.get("device") or ""),
        "step": step,
        "total_steps": total if isinstance(total, int) and not isinstance(total, bool) else None,
        "started": times[0][1] if times else None,
        "updated": times[-1][1] if times else None,
        "seconds": seconds[-1][1] if seconds else None,
        "tokens": tokens,
        "before": shown[0][1] if shown else None,
        "after": shown[-1][1] if shown else None,
        "reward_of": "evaluation" if shown is evals else "training",
        "spark": _spark(rewards),
        "spark_evals": _spark(evals),
    }


def _spark(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, float(f"{value:.4g}")) for step, value in thinned(points, SPARK)]


def plain(value: Any) -> Any:
    """Return a value that JSON can carry: what is not finite becomes a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return value
