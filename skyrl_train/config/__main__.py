"""`python -m skyrl_train.config [--search WORD]`: every key with its default and its meaning."""

from __future__ import annotations

import argparse
import textwrap

from skyrl_train.config.reference import Entry, entries
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.console import lasting_output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m skyrl_train.config", description=__doc__)
    parser.add_argument("--search", metavar="WORD", default="", help="only keys whose name or meaning holds WORD")
    word = parser.parse_args(arguments).search
    rows = [entry for entry in entries(SkyRLConfig) if entry.matches(word)]
    with lasting_output():
        print("\n".join(map(as_text, rows)) if rows else f"no key or meaning holds {word!r}")
    return 0 if rows else 1


def as_text(entry: Entry) -> str:
    refusal = f" (only this value: another one {entry.refusal})" if entry.refusal else ""
    meaning = textwrap.fill(entry.meaning + refusal, 116, initial_indent="    ", subsequent_indent="    ")
    return f"{entry.key}={entry.default}\n{meaning}"


if __name__ == "__main__":
    raise SystemExit(main())
