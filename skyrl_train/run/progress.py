"""The progress of a run: two live bars in a terminal, a plain line per step elsewhere."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from skyrl_train.log_style import INDENT, WIDTH, wrapped
from skyrl_train.run.metrics import PHASES, Metrics, tokens_per_second
from skyrl_train.visible import visible

UNDER_STEP = " " * 11  # of a line that goes on
Columns = tuple[tuple[str, tuple[str, ...], str], ...]
# Heading, metric (the first that a step has), format.
FIRST: Columns = (
    ("reward", ("reward/avg_raw_reward",), "6.3f"),
    ("eval", ("eval/all/avg_score",), "6.3f"),
    ("sft loss", ("sft/loss",), "7.4f"),
    ("explained", ("critic/explained_variance",), "5.2f"),
    ("kl", ("policy/policy_kl", "loss/avg_kl"), "7.4f"),
    ("entropy", ("policy/policy_entropy",), "4.2f"),
    ("grad", ("policy/grad_norm",), "5.2f"),
)
SECOND: Columns = (
    ("tokens/s", ("tokens/s",), ".0f"),
    ("length", ("generate/avg_num_tokens",), ".0f"),
    ("failures", ("generate/env_failures",), ".0f"),
    ("equal groups", ("reward/equal_group_share",), ".0%"),
    ("unreadable", ("generate/invalid_action_share",), ".0%"),
    ("cut", ("generate/cut_reply_share",), ".0%"),
)
ONLY_IF_ANY = {"failures", "equal groups", "unreadable", "cut"}  # left out where they would be shown as 0
KEPT_TIMES = 15  # steps over whose median the time left is estimated


def step_line(step: int, metrics: Metrics, ending: Sequence[str] = (), width: int = WIDTH) -> str:
    """Return what is printed of a step: one line of what matters, and below it the rest, each within `width`.

    What a step did not measure is left out. ending: further words of the first line.

    "step   12   reward  0.412   entropy 1.20   grad  0.31   time   3.1 s
                tokens/s 310   length 24   rollout 1.9 (engine 1.7)   update 1.2"
    """
    values = dict(metrics)
    speed = tokens_per_second(metrics)
    if speed is not None:
        values["tokens/s"] = speed
    first = [f"step {step:4d}", *cells(FIRST, values)]
    second = cells(SECOND, values)
    if "timing/step" in metrics:
        first.append(f"time {metrics['timing/step']:5.1f} s")
        second += breakdown(metrics)
    if "timing/eval" in metrics:
        second.append(f"evaluation {metrics['timing/eval']:.1f} s")
    return "\n".join([*packed([*first, *ending], width), *packed(second, width, first=UNDER_STEP)])


def cells(columns: Columns, values: Metrics) -> list[str]:
    """Return "heading value" of each column that has a value worth showing."""
    found = []
    for heading, keys, form in columns:
        value = next((values[key] for key in keys if key in values), None)
        shown = "" if value is None else f"{value:{form}}"
        if value is not None and not (heading in ONLY_IF_ANY and shown.strip() in ("0", "0%")):
            found.append(f"{heading} {shown}")
    return found


def packed(words: Sequence[str], width: int, first: str = "") -> list[str]:
    """Return the words, three spaces between them, on as few lines of `width` as hold them; later ones are indented."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 3 + len(word) <= width:
            lines[-1] += f"   {word}"
        else:
            lines.append(f"{UNDER_STEP if lines else first}{word}")
    return lines


def breakdown(metrics: Metrics) -> list[str]:
    """Return ["rollout 7.9 (engine 7.2)", "update 4.1", "other 0.4"]: a step's seconds, without what rounds to 0.

    The engine computed in so much of the rollout; in the rest all episodes waited for their environments.
    """
    parts = {name: metrics[f"timing/{key}"] for key, name in PHASES.items() if f"timing/{key}" in metrics}
    parts.pop("evaluation", None)  # not part of the step
    if not parts:
        return []
    parts["other"] = metrics["timing/step"] - sum(parts.values())
    shown = {name: f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05}
    if "rollout" in shown and "timing/engine" in metrics:
        shown["rollout"] += f" (engine {metrics['timing/engine']:.1f})"
    return list(shown.values())


class MovingTime:
    """Estimates the time left from the median of the last steps, which one slow step does not change."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=KEPT_TIMES)
        self.since = time.monotonic()

    def step_done(self, counts: bool = True) -> None:
        """Count the time since the last call as a step, unless counts=False (the evaluation before training)."""
        now = time.monotonic()
        if counts:
            self.seconds.append(now - self.since)
        self.since = now

    def left(self, num_steps: int) -> float | None:
        """Return the seconds for `num_steps` more steps, None before the first."""
        return statistics.median(self.seconds) * num_steps if self.seconds else None


class RunProgress:
    """The whole run's bar, and below it the current phase's: rollout, update, eval.

    with RunProgress(total_steps=10, done=0) as progress:
        progress.phase("rollout", total=32, unit="episodes")
        progress.advance()
        progress.step_done(1, metrics)

    Not in a terminal: one line per step, or none with `plain_lines=False` (the console tracker prints them then).
    """

    def __init__(
        self, total_steps: int, done: int = 0, *, plain_lines: bool = True, console: Console | None = None
    ) -> None:
        self.total, self.done, self.plain_lines = total_steps, done, plain_lines
        self.console = console or Console()
        self.times, self.begun = MovingTime(), False
        self.live = _bars(self.console) if self.console.is_terminal else None
        if self.live is not None:
            self.run_bar = self.live.add_task("run", total=total_steps, completed=done, unit="steps", note="")
            self.phase_bar: TaskID | None = None

    def __enter__(self) -> RunProgress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self._end_phase()
            self.live.stop()

    def phase(self, name: str, total: float, unit: str) -> None:
        """Begin a new second line: `name`, 0 of `total` `unit`. The first one starts the clock: loading is no step."""
        if not self.begun:
            self.begun, self.times.since = True, time.monotonic()
        if self.live is not None:
            self._end_phase()
            self.phase_bar = self.live.add_task(name, total=total, unit=unit, note="")

    def advance(self, amount: float = 1) -> None:
        if self.live is not None and self.phase_bar is not None:
            self.live.advance(self.phase_bar, amount)

    def reached(self, done: float, total: float) -> None:
        """Set the current phase to `done` of `total`, for a caller that counts itself, like the learner."""
        if self.live is not None and self.phase_bar is not None:
            self.live.update(self.phase_bar, completed=done, total=total)

    def step_done(self, step: int, metrics: Metrics) -> None:
        self.times.step_done(counts=step > self.done)
        self.done = step
        left = self.times.left(self.total - step)
        if self.live is not None:
            self._end_phase()
            self.live.update(self.run_bar, completed=step, note=_note(metrics, left))
        elif self.plain_lines:
            ending = [f"{clock(left)} left"] if left is not None and step < self.total else []
            words = [f"[{step}/{self.total}]", *ending]
            print_line(step_line(step, metrics, words, min(WIDTH, self.console.width)), self.console)

    def print(self, text: str) -> None:
        """Print a line above the bars; a log's sink can be set to this."""
        width = min(WIDTH, self.console.width) if self.console.is_terminal else None
        print_line(wrapped(text.rstrip("\n"), width, INDENT), self.console)

    def _end_phase(self) -> None:
        if self.live is not None and self.phase_bar is not None:
            self.live.remove_task(self.phase_bar)
            self.phase_bar = None


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[note]}", style="cyan"),
        console=console,
    )


def _note(metrics: Metrics, left: float | None) -> str:
    speed = tokens_per_second(metrics)
    parts = [
        f"reward {metrics['reward/avg_raw_reward']:.3f}" if "reward/avg_raw_reward" in metrics else "",
        f"{speed:.0f} tokens/s" if speed is not None else "",
        f"{clock(left)} left" if left is not None else "",
    ]
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """Return seconds as a clock shows them: 59.2 -> "1:00", 3725 -> "1:02:05"."""
    whole = math.ceil(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_line(text: str, console: Console | None = None) -> None:
    """Print lines, not wrapped and not styled, also while bars are shown."""
    text = visible(text)
    if console is not None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
