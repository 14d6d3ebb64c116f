"""Print the keys with their defaults and meanings: `python -m skyrl_train.config [--search WORD ...] [--all]`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict

from skyrl_train.config.reference import MOST_USED, Setting, entries, refused_entries
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.console import lasting_output, print_json
from skyrl_train.visible import Parser

WIDTH = 116  # columns of a meaning, and fewer in a narrower terminal


def main(
    arguments: list[str] | None = None,
    prog: str = "python -m skyrl_train.config",
    more: Callable[[], list[Setting]] = list,
) -> int:
    """Print what the arguments ask for, and return 1 if no key matches. more: entries of other packages."""
    parser = Parser(
        prog=prog,
        description="Print every key that does something, with its default and meaning, the most used first.",
    )
    parser.add_argument(
        "--search",
        metavar="WORD",
        nargs="+",
        default=[],
        help="only keys in whose name or meaning all words stand, or that other trainers call so",
    )
    parser.add_argument(
        "--all", action="store_true", help="also the keys of SkyRL that may only keep their default, with the reason"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of keys, defaults and meanings")
    options = parser.parse_args(arguments)
    words = " ".join(options.search)
    known = entries(SkyRLConfig) + more() + (refused_entries() if options.all else [])
    rows = [entry for entry in known if entry.matches(words)]
    with lasting_output():
        if options.json:
            print_json([asdict(entry) for entry in rows])
        else:
            print(table(rows, words, with_refused=options.all))
    return 0 if rows else 1


def table(rows: Sequence[Setting], words: str, *, with_refused: bool) -> str:
    """Return what the command prints: the entries under headings, or where else to look when there are none."""
    if not rows:
        refused = [] if with_refused else [entry for entry in refused_entries() if entry.matches(words)]
        hint = f"; --all shows {len(refused)} that may only keep their default" if refused else ""
        return f"no key that does something has {words!r} in its name or meaning, or elsewhere as its name{hint}"
    sections: dict[str, list[str]] = {}
    for entry in rows:
        sections.setdefault(heading_of(entry), []).append(as_text(entry))
    return "\n\n".join("\n".join([f"# {heading}", *texts]) for heading, texts in sections.items())


def heading_of(entry: Setting) -> str:
    if entry.refusal:
        return "only these values are possible"
    return "most used" if entry.key in MOST_USED else f"other keys of {entry.key.partition('.')[0]}"


def as_text(entry: Setting) -> str:
    refusal = f" (another value {entry.refusal})" if entry.refusal else ""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    meaning = textwrap.fill(entry.meaning + refusal, width, initial_indent="    ", subsequent_indent="    ")
    return f"{entry.key}={entry.default}\n{meaning}"


if __name__ == "__main__":
    raise SystemExit(main())
