"""`skyrl config`: `python -m skyrl_train.config` under its shorter name, with the keys of OpenEnv's environments."""

from __future__ import annotations

from importlib.util import find_spec

from skyrl_train.commands.experiments import OPENENV_KEYS, entry_point
from skyrl_train.config.reference import Setting, entries


def main(words: list[str]) -> int:
    """Print the keys, and return 1 if none matches."""
    from skyrl_train.config.__main__ import main as print_keys

    return print_keys(words, prog="skyrl config", more=_of_openenv)


def _of_openenv() -> list[Setting]:
    """Return the settings `environment.openenv.*`; [] where the integration is not installed."""
    if find_spec("integrations") is None:
        return []
    return [entry for entry in entries(entry_point(openenv=True).ROOT) if entry.key.startswith(f"{OPENENV_KEYS[0]}.")]
