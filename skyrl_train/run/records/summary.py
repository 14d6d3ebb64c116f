"""`summary.json` and the last words of a run: what it reached, where everything lies, what to try next."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from skyrl_train.files import write_whole
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.progress import clock
from skyrl_train.run.records.profile import VIEWER
from skyrl_train.run.records.run_info import read_run_info
from skyrl_train.run.run_folder import METRICS, REPORT, SUMMARY, TRAJECTORIES, checkpoint_steps, profile_steps

EVAL_SCORE, TRAIN_REWARD = "eval/all/avg_score", "reward/avg_raw_reward"


@dataclass(frozen=True)
class Summary:
    """Rewards are of the first and the last evaluation; without evaluations, of the first and the last step.

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


def summarise(run_folder: Path | str) -> Summary:
    """What the records of the run say."""
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
    )


def write_summary(run_folder: Path | str) -> Summary:
    summary = summarise(run_folder)
    write_whole(Path(run_folder) / SUMMARY, (json.dumps(asdict(summary), indent=2) + "\n").encode())
    return summary


def before_and_after(lines: list[dict[str, Any]]) -> tuple[float | None, float | None, str]:
    """First and last reward, and what they are of; two evaluations count more than any training step."""
    for key, name, least in (
        (EVAL_SCORE, "evaluation", 2),
        (TRAIN_REWARD, "training", 1),
        (EVAL_SCORE, "evaluation", 1),
    ):
        rewards = [line[key] for line in lines if key in line]
        if len(rewards) >= least:
            return rewards[0], rewards[-1], name
    return None, None, "training"


def closing_panel(summary: Summary) -> Panel:
    """For a rich console, at the end of a run."""
    headline = Text(f"{summary.model} on {summary.environment}", style="bold")
    if summary.reward_before is not None and summary.reward_after is not None:
        headline.append(f"\n{summary.reward_of} reward {summary.reward_before:.3f} → {summary.reward_after:.3f}")
    headline.append(f"   {summary.steps} steps, {clock(summary.seconds)}, {summary.tokens:,} tokens sampled")
    folder = Path(summary.metrics).parent
    rows = [
        ("checkpoint", summary.checkpoint or "none (trainer.ckpt_interval)"),
        ("metrics", summary.metrics),
        ("trajectories", summary.trajectories),
        ("report", summary.report or "none yet"),
        *([("profile", f"{summary.profile}, one file per step: open it at {VIEWER}")] if summary.profile else []),
        ("next", f"uv run python -m skyrl_train.records show {folder} --worst 3"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value, style="cyan" if name == "next" else ""))
    content = Table.grid(padding=(0, 0, 1, 0))
    content.add_row(headline)
    content.add_row(table)
    return Panel(content, title="done", border_style="green", expand=False)
