"""Import of what a user names as "package.module:name", from the installed packages and the current folder."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skyrl_gym.error import Error


def is_import_path(text: str) -> bool:
    """Return whether the text has the form "package.module:name"."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])


def import_named(path: str) -> Any:
    """Return what "package.module:name" names. A module of the current folder is found, too.

    skyrl_gym.error.Error: the text has another form, there is no such module, or it has no such name. What the module
    itself raises while it is imported is raised.
    """
    if not is_import_path(path):
        hint = f"; write {_module_of(path)}" if ".py:" in path else ""
        raise Error(f"{path!r} must be a name like 'package.module:Class'{hint}")
    module, _, name = path.partition(":")
    _find_in_current_folder(module.partition(".")[0])
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise  # a package that the user's module imports
        raise Error(f"{path!r}: there is no module {missing.name} here ({os.getcwd()}) or installed") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise Error(f"{path!r}: module {module} has no {name}")
        found = getattr(found, part)
    return found


def _find_in_current_folder(package: str) -> None:
    """Let a package of the current folder be imported: Python's console scripts do not look there."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path or package in sys.modules or find_spec(package) is not None:
        return
    if (Path(here) / package).is_dir() or (Path(here) / f"{package}.py").is_file():
        sys.path.append(here)
        importlib.invalidate_caches()


def _module_of(path: str) -> str:
    """Return a path of a file as the import path that is meant: "./games/mine.py:Game" -> "games.mine:Game"."""
    file, _, name = path.rpartition(":")
    return ".".join(Path(file).with_suffix("").parts) + f":{name}"
