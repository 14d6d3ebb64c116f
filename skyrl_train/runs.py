"""`python -m skyrl_train.runs [FOLDER...]`: the runs below some folders; `compare A B`: what differs between two."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyrl_train.console import lasting_output, print_json
from skyrl_train.files import told, user_path
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.compare import Comparison, compare
from skyrl_train.run.records.run_info import RunInfo, read_run_info, state_of
from skyrl_train.run.records.summary import Summary, summarise
from skyrl_train.run.run_folder import METRICS, PREVIOUS, RUN_INFO, USUAL_FOLDERS, usual_folders, where_its_run_is
from skyrl_train.visible import Parser, say, visible

MAX_DEPTH = 4
WIDE, LEAST_OF_LIST, LEAST_OF_COMPARISON = 100, 60, 76  # columns; in fewer of them numbers would be cut


def main(words: Sequence[str] | None = None) -> int:
    """List or compare, and return the exit status: 0, or 2 for a folder that is none."""
    words = list(sys.argv[1:] if words is None else words)
    with lasting_output():
        try:
            return _compare(words[1:]) if words[:1] == ["compare"] else _list(words)
        except (OSError, ValueError) as refused:
            say(f"skyrl runs: {told(refused)}")
            if "--json" in words:
                print_json({"error": told(refused)})
            return 2


def _list(words: list[str]) -> int:
    parser = Parser(prog="skyrl runs", description="List the runs below some folders, newest first.")
    about = f"{' and '.join(USUAL_FOLDERS)} if none is given; or: compare A B"
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=about)
    parser.add_argument("--json", action="store_true", help="print everything that is known of each run as JSON")
    arguments = parser.parse_args(words)
    given = [user_path(folder) for folder in arguments.folders or usual_folders()]
    for folder in given:
        if arguments.folders and not folder.is_dir():
            raise ValueError(f"there is no folder {folder}{where_its_run_is(folder)}")
        if folder.is_dir():
            os.scandir(folder).close()  # OSError if it cannot be read
    runs = [described(folder) for folder in sorted(set(found_below(given)))]
    runs.sort(key=lambda run: run["started"], reverse=True)
    if arguments.json:
        print_json(runs)
    elif not runs:
        print(visible(f"no runs below {', '.join(map(str, given))}; name the folder of yours (trainer.ckpt_path)"))
    else:
        _show_list(runs, _console(LEAST_OF_LIST))
    return 0


def found_below(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield every folder that holds a run, not those that were moved aside within one."""
    for top in folders:
        for place, names, files in os.walk(top):
            depth = len(Path(place).relative_to(top).parts)
            if RUN_INFO in files or METRICS in files:
                yield Path(os.path.abspath(place))  # ".." in it is gone
                names[:] = []  # what lies within a run is its own
            elif depth >= MAX_DEPTH:
                names[:] = []
            else:
                names[:] = [name for name in names if name != PREVIOUS and not name.startswith(".")]


def described(folder: Path) -> dict[str, Any]:
    """Return what is known of a run: its state, summary, settings and starts. Damage is told, not raised."""
    damage, info, summary = "", RunInfo(), None
    try:
        info = read_run_info(folder)
        summary = summarise(folder)
    except (ValueError, TypeError, OSError) as error:  # TypeError: metrics of another program, with texts as values
        damage = str(error)
    last = info.starts[-1] if info.starts else {}
    return {
        "folder": str(folder),
        "name": info.name,
        "started": _started(folder, info),
        "state": "damaged" if damage else state_of(folder, info) or "unknown",
        "error": damage or last.get("error"),
        "environment": info.environment,
        "model": info.model_name,
        "device": info.device,
        "total_steps": info.total_steps,
        **(_results(summary) if summary else {}),
        "changed": info.changed,
        "starts": info.starts,
    }


def _results(summary: Summary) -> dict[str, Any]:
    names = ("reward_before", "reward_after", "reward_of", "steps", "seconds", "tokens", "checkpoint")
    return {name: asdict(summary)[name] for name in names}


def _started(folder: Path, info: RunInfo) -> str:
    """Return when the run began; of one that did not record it, when its metrics were last written."""
    from datetime import datetime

    if info.starts:
        return str(info.starts[0].get("started", ""))
    newest = max((path.stat().st_mtime for name in (METRICS, RUN_INFO) if (path := folder / name).exists()), default=0)
    return datetime.fromtimestamp(newest).astimezone().isoformat(timespec="seconds")


def _console(least: int) -> Console:
    """Return the terminal. One that is too narrow for the numbers breaks the lines itself."""
    return Console(highlight=False, width=max(Console().width, least))


def _show_list(runs: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table that fits 80 columns, with model and environment from 100 on. A run's folder has its own line."""
    wide = console.width >= WIDE
    headings = ("started", "ended", "steps", "reward", "environment", "model")[: 5 + wide]
    rows = [[visible(cell) for cell in _cells(run)][: len(headings)] for run in runs]
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    left = console.width - sum(widths[:4]) - 2 * (len(headings) - 1)  # of which two names have at least half each
    widths[4:] = [max(1, min(width, max(left // (1 + wide), left - sum(widths[4:]) + width))) for width in widths[4:]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, width in zip(headings, widths, strict=True):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    lines = _printed(table, console.width)
    console.print(lines[0], markup=False)
    for line, run in zip(lines[1:], runs, strict=True):
        console.print(line, markup=False)
        console.print(f"  {visible(short_path(run['folder']))}", markup=False, soft_wrap=True, style="cyan")
        if run["error"]:
            console.print(f"  {visible(str(run['error']))}", markup=False, style="yellow")


def _cells(run: dict[str, Any]) -> list[str]:
    began = run["started"][:16].replace("T", " ")
    return [began, run["state"], _steps(run), _reward(run), run["environment"], run["model"]]


def _printed(table: Table, width: int) -> list[str]:
    """Return the lines of a table as text; each row is one."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def _steps(run: dict[str, Any]) -> str:
    total = run["total_steps"]
    return f"{run.get('steps', 0)}/{total}" if total else str(run.get("steps", 0))


def _reward(run: dict[str, Any]) -> str:
    before, after = run.get("reward_before"), run.get("reward_after")
    return "" if before is None or after is None else f"{before:.3f} > {after:.3f}"


def short_path(folder: str) -> str:
    """Return a path with ~ for the home folder."""
    home = str(Path.home())
    return f"~{folder.removeprefix(home)}" if folder.startswith(f"{home}/") else folder


def _compare(words: list[str]) -> int:
    parser = Parser(
        prog="skyrl runs compare", description="Show what differs between two runs. Of more, `skyrl view` shows it."
    )
    parser.add_argument("a", metavar="A", help="folder of a run")
    parser.add_argument("b", metavar="B", help="folder of another")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    arguments = parser.parse_args(words)
    folders = [user_path(folder) for folder in (arguments.a, arguments.b)]
    for folder in folders:
        if not (folder / METRICS).is_file() and not (folder / RUN_INFO).is_file():
            lacks = f"{folder} is no run's folder: it has neither {RUN_INFO} nor {METRICS}"
            raise ValueError(lacks + where_its_run_is(folder))
    infos = [read_run_info(folder) for folder in folders]
    lines = [read_metrics(folder / METRICS) for folder in folders]
    found = compare(infos[0], infos[1], lines[0], lines[1])
    if arguments.json:
        print_json({"a": str(folders[0]), "b": str(folders[1]), **asdict(found)})
    else:
        _show_comparison(found, folders, _console(LEAST_OF_COMPARISON))
    return 0


def _show_comparison(found: Comparison, folders: Sequence[Path], console: Console) -> None:
    for letter, folder in zip("AB", folders, strict=True):
        console.print(f"{letter}  {visible(short_path(str(folder.absolute())))}", markup=False, soft_wrap=True)
    for title, rows in (("model, code, versions and machine", found.differences), ("settings", found.settings)):
        if not rows:
            console.print(f"\n{title}: the same")
            continue
        console.print(f"\n{title} that differ", style="bold")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", "A", "B"):
            table.add_column(heading, overflow="fold")
        for name, (a, b) in rows.items():
            table.add_row(*(Text(visible(_shown(value))) for value in (name, a, b)))
        console.print(table)
    console.print("\nmetrics", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "A first", "last", "best", "B first", "last", "best"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name, of_run in found.metrics.items():
        cells = [_number(of_run[run].get(which)) for run in "ab" for which in ("first", "last", "best")]
        table.add_row(Text(name), *cells)
    console.print(table)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
