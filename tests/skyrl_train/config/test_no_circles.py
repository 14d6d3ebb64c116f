"""No file of the configuration imports, by whatever way, a file that imports it: not in a function, not for types."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import skyrl_train.config

FOLDER = Path(skyrl_train.config.__file__).parent
PACKAGE = "skyrl_train.config"


def imports_of(source: str) -> set[str]:
    """Modules of the package that a source names in any import statement, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{PACKAGE}.") for name in found if name.startswith(f"{PACKAGE}.")}


def graph() -> dict[str, set[str]]:
    files = {path.stem: imports_of(path.read_text()) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    return {name: used & files.keys() for name, used in files.items()}


def test_the_files_of_the_configuration_stand_in_an_order():
    order = list(TopologicalSorter(graph()).static_order())
    assert order.index("problems") < order.index("section") < order.index("root") < order.index("load")


@pytest.mark.parametrize(
    "way", ["from {} import x", "def f():\n    import {}", "if TYPE_CHECKING:\n    from {} import x"]
)
def test_a_circle_would_be_found(way):
    circle = {**graph(), "validation": imports_of(way.format("skyrl_train.config.root"))}
    with pytest.raises(CycleError):
        TopologicalSorter(circle).prepare()
