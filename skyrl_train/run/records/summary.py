"""`summary.json` and the panel at the end of a run: its rewards, the paths of its files, what to try next."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from skyrl_train.console import as_typed
from skyrl_train.files import byte_size, folder_bytes, write_whole
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.progress import clock
from skyrl_train.run.records.profile import VIEWER
from skyrl_train.run.records.run_info import read_run_info
from skyrl_train.run.run_folder import METRICS, MODEL, REPORT, SUMMARY, TRAJECTORIES, checkpoint_steps, profile_steps
from skyrl_train.visible import visible

EVAL_SCORE, TRAIN_REWARD = "eval/all/avg_score", "reward/avg_raw_reward"


@dataclass(frozen=True)
class Summary:
    """The result of a run. Rewards are of the first and the last evaluation, or step if there was no evaluation.

    seconds: the run's work over all its processes. tokens: sampled for training. Paths of files that exist.
    """

    model: str
    environment: str
    reward_before: float | None
    reward_after: float | None
    reward_of: str  # "evaluation" or "training"
    steps: int
    seconds: float
    tokens: int
    checkpoint: str | None
    metrics: str
    trajectories: str
    report: str | None
    profile: str | None  # the newest step's
    steps_without_learning: int = 0  # in which no optimizer step had a gradient
    model_folder: str | None = None  # in Hugging Face format
    model_bytes: int = 0


def summarise(run_folder: Path | str) -> Summary:
    """Return the summary of the records in a run's folder."""
    folder = Path(run_folder)
    lines, info = read_metrics(folder / METRICS), read_run_info(folder)
    before, after, reward_of = before_and_after(lines)
    saved = max(checkpoint_steps(folder), default=None)
    profiles = [str(path) for path in profile_steps(folder)]
    return Summary(
        model=info.model_name,
        environment=info.environment,
        reward_before=before,
        reward_after=after,
        reward_of=reward_of,
        steps=max((line["step"] for line in lines), default=0),
        seconds=lines[-1].get("elapsed_s", 0.0) if lines else 0.0,
        tokens=int(sum(line.get("generate/num_sampled_tokens", 0) for line in lines)),
        checkpoint=None if saved is None else str(folder / f"global_step_{saved}"),
        metrics=str(folder / METRICS),
        trajectories=str(folder / TRAJECTORIES),
        report=str(folder / REPORT) if (folder / REPORT).exists() else None,
        profile=profiles[-1] if profiles else None,
        steps_without_learning=num_steps_without_learning(lines),
        model_folder=str(folder / MODEL) if (folder / MODEL).is_dir() else None,
        model_bytes=folder_bytes(folder / MODEL),
    )


def num_steps_without_learning(lines: list[dict[str, Any]]) -> int:
    """Return how many of the steps learned nothing (run/standstill.py)."""
    return sum(line.get("trainer/steps_without_learning", 0) > 0 for line in lines)


def write_summary(run_folder: Path | str) -> Summary:
    summary = summarise(run_folder)
    write_whole(Path(run_folder) / SUMMARY, (json.dumps(asdict(summary), indent=2) + "\n").encode())
    return summary


def before_and_after(lines: list[dict[str, Any]]) -> tuple[float | None, float | None, str]:
    """Return the first and the last reward, and their kind: of two evaluations, else of training steps."""
    for key, name, least in (
        (EVAL_SCORE, "evaluation", 2),
        (TRAIN_REWARD, "training", 1),
        (EVAL_SCORE, "evaluation", 1),
    ):
        rewards = [line[key] for line in lines if isinstance(line.get(key), int | float)]
        if len(rewards) >= least:
            return rewards[0], rewards[-1], name
    return None, None, "training"


def closing_panel(summary: Summary) -> Group:
    """Return what a rich console prints at the end of a run, with soft_wrap: paths and commands stay whole.

    They stand outside the box, where a terminal's own wrapping does not break what is copied.
    """
    headline = Text(visible(f"{summary.model} on {summary.environment}"), style="bold", no_wrap=False, overflow="fold")
    if summary.reward_before is not None and summary.reward_after is not None:
        headline.append(f"\n{summary.reward_of} reward {summary.reward_before:.3f} → {summary.reward_after:.3f}")
    headline.append(f"   {summary.steps} steps, {clock(summary.seconds)}, {summary.tokens:,} tokens sampled")
    if summary.steps_without_learning:
        headline.append(f"\nnothing could be learned in {summary.steps_without_learning} of them", style="yellow")
    folder = Path(summary.metrics).parent
    rows = [
        ("model", _model(summary)),
        ("checkpoint", summary.checkpoint or "none (trainer.ckpt_interval)"),
        ("metrics", summary.metrics),
        ("trajectories", summary.trajectories),
        ("report", summary.report or "none yet"),
        *([("profile", f"{summary.profile}, one file per step: open it at {VIEWER}")] if summary.profile else []),
    ]
    quoted = shlex.quote(str(folder))
    commands = [("look at it", f"skyrl view {quoted}")]
    if summary.model_folder:
        commands += [("talk to it", f"skyrl chat {quoted}"), ("watch it", f"skyrl play --model {quoted} --before")]
    width = max(len(name) for name, _ in rows)
    lines = [Text.assemble((f"{name:{width}}  ", "dim"), value) for name, value in rows]
    lines += [Text.assemble((f"{name:{width}}  ", "dim"), (as_typed(value), "cyan")) for name, value in commands]
    return Group(Panel(headline, title="done", border_style="green", expand=False), *lines)


def _model(summary: Summary) -> str:
    if summary.model_folder is None:
        return (
            "none (skyrl export writes it from the checkpoint)" if summary.checkpoint else "none without a checkpoint"
        )
    return f"{summary.model_folder} ({byte_size(summary.model_bytes)}, Hugging Face format)"
