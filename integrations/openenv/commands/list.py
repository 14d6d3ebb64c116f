"""`list`: show the environments of the catalog, their options, and whether engine and image are on this machine."""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import fields

from rich.console import Console

from integrations.openenv.catalog import CATALOG, FORMS, CatalogEntry
from skyrl_train.console import install_extra
from skyrl_train.log_style import WIDTH, wrapped

DOCKER_PATIENCE_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # none


def run(arguments: argparse.Namespace) -> int:
    del arguments
    here = images_here()
    console = Console(highlight=False)
    for entry in CATALOG.values():
        engine = "installed" if entry.has_engine else "not installed"
        image = "no Docker" if here is None else ("here" if entry.local_image in here else "not here")
        turns = f"{entry.max_turns} turn{'s' if entry.max_turns > 1 else ''}"
        console.print(f"[bold cyan]{entry.name}[/]  {turns}; engine: {engine}; image: {image}")
        for text in (about(entry), options_text(entry)):
            for line in wrapped(text, min(console.width, WIDTH) - 2).splitlines():
                console.print(f"  {line}", markup=False, soft_wrap=True)
        if not entry.has_engine and entry.extra:
            console.print(f"  {install_extra(entry.extra)}", markup=False, soft_wrap=True, style="cyan")
    others = f"An environment may also be {FORMS}, or a class of yours as my_module:MyEnv."
    console.print(f"\n{wrapped(others, min(console.width, WIDTH))}", markup=False, soft_wrap=True)
    return 0


def about(entry: CatalogEntry) -> str:
    """Return the first line of the entry's docstring."""
    return (type(entry).__doc__ or "").strip().split("\n")[0]


def options_text(entry: CatalogEntry) -> str:
    """Return "options: name=default" of all options; "" where there are none."""
    plain = entry.read_options({})
    shown = ", ".join(f"{option.name}={getattr(plain, option.name)!r}" for option in fields(plain))
    return f"options: {shown}" if shown else ""


def images_here() -> set[str] | None:
    """Return "name:tag" of every image that Docker has; None if no Docker answers."""
    command = ["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(listed.stdout.split()) if listed.returncode == 0 else None
