"""`serve`: run our own server of an environment in the foreground."""

from __future__ import annotations

import argparse
import os
import sys

from integrations.openenv.catalog import CATALOG, catalog_entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env", metavar="ENV", help=f"{', '.join(CATALOG)}, or a folder or an app")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="for the server: --port, --host, --max-sessions, ...")


def run(arguments: argparse.Namespace) -> int:
    entry = catalog_entry(arguments.env)
    source = entry.source(entry.read_options({}))
    if source.module is None:
        where = (
            f"it runs at {source.url} already" if source.url else f"docker run -p 127.0.0.1:8000:8000 {source.image}"
        )
        raise ValueError(f"{entry.name}: there is no server of ours for it ({where})")
    command = [sys.executable, "-m", source.module, *source.arguments, *arguments.flags]
    os.execv(command[0], command)  # Ctrl-C and signals reach the server itself
