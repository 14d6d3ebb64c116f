"""Who imports whom, read from the source: edges between modules, and circles among the entries of each folder."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]  # module -> modules that it imports


def module_name(path: Path) -> str:
    """skyrl_train/run/run.py -> skyrl_train.run.run; a package is its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: Mapping[Path, str], *, in_functions: bool) -> Graph:
    """Return the imports among these files, those under `if TYPE_CHECKING` left out.

    in_functions: whether imports count that are made only when a function is called.
    """
    modules = {module_name(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        name = module_name(path)
        found = (_known(target, modules) for target in _targets(path, ast.parse(source).body, in_functions))
        graph[name] = {target for target in found if target and target != name}
    return graph


def circles(graph: Graph) -> Iterator[list[str]]:
    """Yield the entries (files and folders) of a folder that import each other in a circle, folder by folder.

    run/metrics.py -> run/records/episode.py, run/records/report.py -> run/metrics.py: a circle of metrics and records,
    although no module is in one.
    """
    folders = {"", *(module.rpartition(".")[0] for module in graph)}
    for folder in sorted(folders):
        among: dict[str, set[str]] = {}
        for module, targets in graph.items():
            if entry := _entry(folder, module):
                own = among.setdefault(entry, set())
                own |= {other for target in targets if (other := _entry(folder, target)) and other != entry}
        yield from (sorted(circle) for circle in _components(among) if len(circle) > 1)


def _targets(path: Path, nodes: Iterable[ast.AST], in_functions: bool) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _targets(path, node.orelse, in_functions)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _targets(path, ast.iter_child_nodes(node), in_functions)


def _known(target: str, modules: set[str]) -> str:
    """The module behind `package.module.name`; "" for what is not among ours."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target


def _entry(folder: str, module: str) -> str:
    """The entry of a folder that a module lies in: ("run", "run.records.episode") -> "run.records".

    A package's own __init__.py is an entry of its folder, too: ("run", "run") -> "run.__init__".
    """
    if module == folder:
        return f"{folder}.__init__"
    prefix = f"{folder}." if folder else ""
    return prefix + module[len(prefix) :].partition(".")[0] if module.startswith(prefix) else ""


def _components(graph: Graph) -> list[set[str]]:
    """The sets of nodes that can all reach each other."""
    reachable = {node: _reachable(graph, node) for node in graph}
    components: list[set[str]] = []
    for node in graph:
        component = {node} | {other for other in reachable[node] if node in reachable.get(other, ())}
        if component not in components:
            components.append(component)
    return components


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(graph.get(start, ()))
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += graph.get(node, ())
    return seen
