"""Episodes in the terminal, as conversations."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.run.records.trajectories import Phase, read_trajectories, trajectory_files
from skyrl_train.visible import visible

SAMPLED, GIVEN = "bold green", "dim"


def show(run_folder: Path, phase: Phase, step: int | None, pick: str, count: int, console: Console) -> None:
    """Print `count` episodes of a step (None: the last) in the order that `pick` names: first, best or worst."""
    files = trajectory_files(run_folder, phase)
    if not files:
        raise FileNotFoundError(
            f"{run_folder} holds no {phase} trajectories; is it a run's folder (trainer.ckpt_path)?"
        )
    step = max(files) if step is None else step
    if step not in files:
        raise ValueError(f"no {phase} trajectories of step {step}; there are steps {_ranges(sorted(files))}")
    episodes = read_trajectories(files[step])
    if pick != "first":
        episodes.sort(key=lambda e: e.reward, reverse=pick == "best")
    rewards = [e.reward for e in episodes]
    mean = sum(rewards) / max(len(rewards), 1)
    console.print(f"{phase} step {step}: {len(episodes)} episodes, mean reward {mean:.3f}", style="bold")
    for episode in episodes[:count]:
        print_episode(episode, console)


def print_episode(episode: EpisodeRecord, console: Console) -> None:
    """Print every token of the episode in order; the policy's own stand out."""
    named = "".join(f", {name} {reward:g}" for name, reward in episode.rewards.items())
    title = f"prompt {episode.uid}, repetition {episode.repetition}: reward {episode.reward:g}{named}, {episode.end}"
    console.rule(Text(visible(title)))
    for segment in episode.segments:
        if segment.new_history and segment.turn > 0:
            console.print("-- the history was edited here --", style="yellow")
        console.print(Text(visible(segment.text), style=SAMPLED if segment.sampled else GIVEN), soft_wrap=True)
        if segment.sampled:
            console.print(visible(_turn_line(episode, segment.turn)), style="cyan")
    if episode.failure:
        console.print(Text(f"failed: {visible(episode.failure)} (attempts: {episode.num_attempts})", style="red"))


def _turn_line(episode: EpisodeRecord, number: int) -> str:
    turn = episode.turns[number]
    return f"   turn {number}: reward {turn.reward:g}, stopped by {turn.stop_reason}, policy {turn.policy_version}"


def _ranges(steps: list[int]) -> str:
    """Return the steps as ranges: [1, 2, 3, 7] -> "1-3, 7"."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
