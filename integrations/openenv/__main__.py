"""python -m integrations.openenv list | play ENV | check ENV | serve ENV | doctor

ENV is an environment of the catalog, an address, an image, a folder or an app (catalog/generic/names.py). For play and
check it may also be a class of yours, my_module:MyEnv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from integrations.openenv.commands import check, doctor, play, serve
from integrations.openenv.commands import list as list_command
from skyrl_train.console import lasting_output, print_json
from skyrl_train.signals import ends_when_asked, interrupted
from skyrl_train.visible import Parser, make_errors_visible, say

COMMANDS = {
    "list": (list_command, "list the environments and their options"),
    "play": (play, "play an environment by hand, or watch a model play it"),
    "check": (check, "find what would make training in an environment fail"),
    "serve": (serve, "run our own server of an environment"),
    "doctor": (doctor, "report what this machine can run, and why not"),
}


def main(words: Sequence[str] | None = None, prog: str = "python -m integrations.openenv") -> int:
    parser = Parser(prog=prog, description="OpenEnv environments.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=about, description=about[0].upper() + about[1:]))
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with lasting_output():
            make_errors_visible()
            return COMMANDS[arguments.command][0].run(arguments)
    except ValueError as refused:  # an unknown environment or option
        say(f"{parser.prog} {arguments.command}: {refused}")
        if getattr(arguments, "json", False):
            print_json({"error": f"{refused}"})
        return 2
    except KeyboardInterrupt:
        return interrupted(f"{parser.prog} {arguments.command}")


if __name__ == "__main__":
    sys.exit(ends_when_asked(main))
