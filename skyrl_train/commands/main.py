"""`skyrl COMMAND ...`: a table of subcommands by import path. Only the one that is asked for is imported."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from skyrl_train.console import lasting_output, print_json
from skyrl_train.signals import ends_when_asked, interrupted

DONE, FAILED, REFUSED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: the module whose `main(words)` runs it and returns the exit status.

    within: the name of the command in a program of several commands, whose `main` takes `prog`, its own name.
    """

    module: str
    about: str
    within: str | None = None

    @property
    def is_here(self) -> bool:
        """Return whether the module is installed. Only packages around it are imported."""
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False

    def run(self, words: list[str]) -> int:
        main = import_module(self.module).main
        return int(main(words) if self.within is None else main([self.within, *words], prog="skyrl"))


OPENENV = "integrations.openenv.__main__"
COMMANDS: dict[str, Command] = {
    "train": Command("skyrl_train.commands.train", "train a model in an environment, or on prompts with a reward"),
    "eval": Command("skyrl_train.commands.evaluate", "play the evaluation of runs and models, without training"),
    "play": Command(OPENENV, "play an environment by hand, or watch a model play", "play"),
    "chat": Command("skyrl_train.commands.chat", "talk to a trained model in the terminal"),
    "serve": Command("skyrl_train.commands.serve", "serve a trained model with OpenAI's API"),
    "export": Command(
        "skyrl_train.commands.export", "write the model of a run as a Hugging Face folder or a GGUF file"
    ),
    "runs": Command("skyrl_train.runs", "list runs, and compare them"),
    "view": Command("skyrl_train.view.command", "look at runs and their episodes in a browser"),
    "check": Command(OPENENV, "find what would make training in an environment fail", "check"),
    "config": Command("skyrl_train.commands.config", "print the settings, with defaults and meanings"),
    "doctor": Command(OPENENV, "report what this machine can run, and why not", "doctor"),
}


def program() -> int:
    """Run `main` as the program of this process."""
    return ends_when_asked(main)


def main(words: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first word names; return 0 if it went well, 1 if not, 2 if it was refused."""
    with lasting_output():
        return _main(list(sys.argv[1:] if words is None else words))


def _main(words: list[str]) -> int:
    if not words:
        print(usage(), file=sys.stderr)
        return REFUSED
    name, *rest = words
    if name in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if name == "--version":
        from skyrl_train import __version__

        print(f"skyrl-train {__version__}")
        return DONE
    command = COMMANDS.get(name)
    if command is None or not command.is_here:
        near = difflib.get_close_matches(name, offered(), n=1)
        meant = f"did you mean `skyrl {near[0]}`?" if near else f"there are {', '.join(offered())}"
        print(f"skyrl: there is no command {name!r}; {meant}", file=sys.stderr)
        return REFUSED
    return run(name, command, rest)


def run(name: str, command: Command, words: list[str]) -> int:
    """Run the command. What it refuses by a ValueError becomes one line and status 2, a broken engine one and 1."""
    try:
        return command.run(words)
    except KeyboardInterrupt:
        return interrupted(f"skyrl {name}")
    except SystemExit as ended:
        if ended.code == REFUSED:  # argparse has said on stderr what is wrong
            _tell_program("the command line cannot be read; stderr says why", words)
        raise
    except (ValueError, OSError) as refused:
        from skyrl_train.files import told
        from skyrl_train.visible import say

        say(f"skyrl {name}: {told(refused)}")
        _tell_program(told(refused), words)
        return REFUSED
    except RuntimeError as error:
        from skyrl_train.engine.base import EngineDied, engine_death
        from skyrl_train.rollout.round import EveryEpisodeFailed
        from skyrl_train.visible import say

        stopped = engine_death(error) or error
        if not isinstance(stopped, EngineDied | EveryEpisodeFailed):
            raise
        say(f"skyrl {name}: stopped: {stopped}")
        _tell_program(f"{stopped}", words)
        return FAILED


def _tell_program(error: str, words: Sequence[str]) -> None:
    """Print the error as JSON where --json has been asked for, so that the output is JSON in any case."""
    if "--json" in words:
        print_json({"error": error})


def offered() -> list[str]:
    return [name for name, command in COMMANDS.items() if command.is_here]


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {COMMANDS[name].about}" for name in offered()]
    return "\n".join(
        [
            "usage: skyrl COMMAND ...",
            "",
            "Train a language model by reinforcement learning, and use it.",
            "",
            *lines,
            "",
            "`skyrl COMMAND --help` says more. Exit status: 0 done, 1 failed, 2 refused before anything began,",
            "130 after Ctrl-C, 143 after SIGTERM.",
        ]
    )
