"""The registry: EnvSpecs by environment id, and `make`, which makes an environment from its id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_gym.core import EntryPoint, Env, EnvSpec, load_entry_point, print_or_return
from skyrl_gym.error import Error, RegistrationError
from skyrl_gym.importing import import_named, is_import_path

# EnvSpec and load_entry_point are defined in core.py and importable from here, where SkyRL has them.
__all__ = ["EnvSpec", "deregister", "load_entry_point", "make", "pprint_registry", "register", "registry", "spec"]

registry: dict[str, EnvSpec] = {}


def register(id: str, entry_point: EntryPoint | None = None, kwargs: dict[str, Any] | None = None) -> None:
    """Make `id` known. A string entry point is imported only when an environment is made."""
    if entry_point is None:
        raise AssertionError(f"register({id!r}) needs an entry_point: a class, a factory or 'package.module:Class'")
    if id in registry:
        raise RegistrationError(f"{id!r} is already registered, to {registry[id].entry_point}; deregister it first")
    registry[id] = EnvSpec(id, entry_point, dict(kwargs or {}))


def deregister(id: str) -> None:
    """Remove `id` from the registry; Error if it is not registered."""
    if registry.pop(id, None) is None:
        raise _unknown(id)


def spec(id: str) -> EnvSpec:
    """Return the spec registered under `id`, or one for the class at the import path "package.module:Class".

    Error, with the known ids, if it is neither.
    """
    if id in registry:
        return registry[id]
    if is_import_path(id):
        return EnvSpec(id, id)
    if ":" in id:
        import_named(id)  # it says what is wrong with the path
    raise _unknown(id)


def _unknown(id: str) -> Error:
    known = ", ".join(sorted(registry)) or "none"
    return Error(
        f"no environment {id!r} is registered; known: {known} (pprint_registry() prints them). "
        "A class of your own needs no registration: name it as my_module:MyEnv"
    )


def make(id: str | EnvSpec, **kwargs: Any) -> Env:
    """Return a new environment of the given id or spec; `kwargs` override the spec's (see EnvSpec.make)."""
    return (id if isinstance(id, EnvSpec) else spec(id)).make(**kwargs)


def pprint_registry(
    print_registry: Mapping[str, EnvSpec] = registry, *, num_cols: int = 3, disable_print: bool = False
) -> str | None:
    """Print the registered ids in columns, or return the text if `disable_print`."""
    ids = sorted(print_registry)
    width = max(map(len, ids), default=0)
    rows = [ids[start : start + num_cols] for start in range(0, len(ids), num_cols)]
    return print_or_return("\n".join("  ".join(id.ljust(width) for id in row).rstrip() for row in rows), disable_print)
