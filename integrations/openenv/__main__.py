"""python -m integrations.openenv list | play ENV | check ENV | serve ENV | doctor

ENV is an environment of the catalog, an address, an image, a folder or an app (catalog/generic/names.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from integrations.openenv.commands import check, doctor, play, serve
from integrations.openenv.commands import list as list_command
from skyrl_train.console import lasting_output
from skyrl_train.visible import make_errors_visible, say

COMMANDS = {
    "list": (list_command, "the environments and their options"),
    "play": (play, "play an environment by hand, in the terminal"),
    "check": (check, "what would make training in an environment fail"),
    "serve": (serve, "run our own server of an environment"),
    "doctor": (doctor, "what this machine can run, and why not"),
}


def main(words: Sequence[str] | None = None, prog: str = "python -m integrations.openenv") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="OpenEnv environments.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=about, description=about[0].upper() + about[1:]))
    arguments = parser.parse_args(words)
    try:
        with lasting_output():
            make_errors_visible()
            return COMMANDS[arguments.command][0].run(arguments)
    except ValueError as refused:  # an unknown environment or option
        say(f"{parser.prog} {arguments.command}: {refused}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
