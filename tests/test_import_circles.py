"""No module imports, directly or through others, a module that imports it: else a reader can begin with neither."""

from __future__ import annotations

import ast
from collections.abc import Set as AbstractSet
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

Graph = dict[str, set[str]]  # of each module: the modules it imports


def import_graph(*folders: str) -> Graph:
    """Return the imports between the modules below these folders, wherever they stand in a file."""
    files = {module_name(path): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return {name: imports(path.read_text(encoding="utf-8"), files.keys()) - {name} for name, path in files.items()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, known: AbstractSet[str]) -> set[str]:
    """Return those of the known modules that a source names. `from a import b` names a, and a.b if that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found.intersection(known)


def circle(graph: Graph) -> list[str]:
    """Return the modules of one circle, the first one again at its end; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        return found.args[1]
    return []


def test_skyrl_gym_and_the_integrations_import_without_circles():
    graph = import_graph("skyrl_gym", "integrations")
    assert "skyrl_gym.core" in graph["skyrl_gym.envs.registration"]
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("sources", "is_circle"),
    [
        ({"a": "import b", "b": "import c", "c": ""}, False),
        ({"a": "import b", "b": "import c", "c": "from a import x"}, True),
        ({"a": "def f():\n    import b", "b": "if TYPE_CHECKING:\n    import a"}, True),
        ({"p": "", "p.m": "from p import n", "p.n": "from p.m import x"}, True),
    ],
)
def test_a_circle_is_found_wherever_its_imports_stand(sources, is_circle):
    graph = {name: imports(source, sources.keys()) for name, source in sources.items()}
    assert bool(circle(graph)) is is_circle
