"""`list`: show the environments of the catalog, their options, and whether engine and image are on this machine."""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from integrations.openenv.catalog import CATALOG, FORMS, CatalogEntry

DOCKER_PATIENCE_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # none


def run(arguments: argparse.Namespace) -> int:
    del arguments
    here = images_here()
    table = Table(title="OpenEnv environments", title_justify="left")
    for column in ("environment", "what it is", "options", "turns", "engine", "image"):
        table.add_column(column, overflow="fold")
    for entry in CATALOG.values():
        engine = "installed" if entry.has_engine else f"uv sync --extra {entry.extra}"
        image = "no Docker" if here is None else ("here" if entry.local_image in here else "not here")
        table.add_row(entry.name, about(entry), options_text(entry), str(entry.max_turns), engine, image)
    console = Console()
    console.print(table)
    console.print(f"An environment may also be {FORMS}.")
    return 0


def about(entry: CatalogEntry) -> str:
    """Return the first line of the entry's docstring."""
    return (type(entry).__doc__ or "").strip().split("\n")[0]


def options_text(entry: CatalogEntry) -> str:
    """Return "name=default" of each option, a line each."""
    plain = entry.read_options({})
    return "\n".join(f"{option.name}={getattr(plain, option.name)!r}" for option in fields(plain))


def images_here() -> set[str] | None:
    """Return "name:tag" of every image that Docker has; None if no Docker answers."""
    command = ["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(listed.stdout.split()) if listed.returncode == 0 else None
