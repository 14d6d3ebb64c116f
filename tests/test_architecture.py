"""Rules for the source itself: allowed imports, no broad except, no very long function, no loose ends."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.import_graph import Graph, circles, import_graph

ROOT = Path(__file__).parent.parent
FOLDERS = ("skyrl_gym", "skyrl_train", "integrations", "examples", "tests")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FUNCTION_LINES = 100
# What each room of integrations/openenv may import of the others: only what stands above it, so there is no circle.
# Whatever is not listed (env.py, the commands, the entry points) stands at the front and may import every room.
ROOMS: dict[str, tuple[str, ...]] = {
    "client": (),
    "config": (),
    "hosting": ("client", "config"),
    "pool": ("client", "config", "hosting"),
    "catalog": ("client", "hosting.source"),
    "servers": ("catalog", "client.descriptors"),
    "images": ("client", "hosting", "catalog"),
}
FRONT = {"commands", "entrypoints"}
# What a server's container imports; there stand integrations/ and skyrl_gym/ alone.
IN_IMAGES = tuple(f"integrations/openenv/{room}/" for room in ("catalog", "client", "servers"))
KERNELS = ("skyrl_train.ops.cpu", "skyrl_train.ops.cuda_", "triton", "liger_kernel")  # known to skyrl_train/ops/ alone
WITHOUT_KERNELS = re.compile(r"(kernels|passes|tiles) is (not )?None")
# The rooms of skyrl_train from the leaves up. A file imports, when it is loaded, only from its own line and from those
# above it. An import in a function may go down (an entry point builds everything); one under TYPE_CHECKING is a name.
OF_A_RUN = ("records", "runs", "view", "cluster", "entrypoints")
ORDER: tuple[tuple[str, ...], ...] = (
    (
        "types",
        "config",
        "files",
        "spans",
        "compute",
        "console",
        "log_style",
        "signals",
        "visible",
        "users_functions",
        "callbacks",
        "left_out",
        "vain_overrides",
    ),
    ("algorithms", "batch"),
    ("ops",),
    ("policy",),
    ("learner", "engine", "rollout", "weights"),
    ("run",),
    ("prompts", "given_prompts", "conversations", "trainer", "evaluate"),
    ("generators", "inference_engines", "ray_ppo_trainer", "dataset", "utils", *OF_A_RUN),
    ("commands", "__main__"),
)
LOOSE_ENDS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")

Finding = tuple[int, str]  # line, what is wrong there


def imported_modules(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Every module that a file imports, wherever in it, relative imports and import_module("name") included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        for argument in arguments_of("import_module", node):
            if isinstance(argument, ast.Constant):
                yield argument.lineno, str(argument.value)


def arguments_of(name: str, node: ast.AST) -> list[ast.expr]:
    """The arguments, if the node is a call of `name` or of `something.name`."""
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name
    return node.args if is_call else []


def forbidden_for(path: Path) -> set[str]:
    """Packages that a file must not import."""
    text = path.as_posix()
    if text.startswith("skyrl_gym/"):
        return {"torch", "ray", "transformers", "skyrl_train", "integrations"}
    if text.startswith(IN_IMAGES):
        return {"torch", "skyrl_train"}
    if not text.startswith("skyrl_train/"):
        return set()
    forbidden = {"integrations", "ray", "vllm"}
    if text.startswith("skyrl_train/cluster/"):
        forbidden.remove("ray")
    if text.startswith("skyrl_train/engine/vllm/") and not text.endswith("/settings.py"):  # that one the driver reads
        forbidden.remove("vllm")
    return forbidden


def forbidden_imports(path: Path, source: str) -> Iterator[Finding]:
    forbidden = forbidden_for(path)
    for line, module in imported_modules(path, ast.parse(source)):
        if module.partition(".")[0] in forbidden:
            yield line, f"imports {module}"


def imports_of_other_rooms(path: Path, source: str) -> Iterator[Finding]:
    room = path.parts[2].removesuffix(".py") if path.parts[:2] == ("integrations", "openenv") else ""
    if room not in ROOMS:
        return
    for line, module in imported_modules(path, ast.parse(source)):
        _, _, name = f"{module}.".partition("integrations.openenv.")
        if name and not name.startswith(tuple(f"{allowed}." for allowed in (room, *ROOMS[room]))):
            yield line, f"imports {module}, which is not above the room {room}"


def kernels_outside_ops(path: Path, source: str) -> Iterator[Finding]:
    """Imports of kernels, of a compiler, and questions whether there are any, outside the room that answers them."""
    if path.parts[0] != "skyrl_train" or path.parts[1] == "ops":
        return
    for line, module in imported_modules(path, ast.parse(source)):
        if module.startswith(KERNELS):
            yield line, f"imports {module}; use ops_for of skyrl_train.ops"
    for number, line in enumerate(source.splitlines(), start=1):
        if WITHOUT_KERNELS.search(line):
            yield number, "asks whether there are kernels"


def broad_excepts(_: Path, source: str) -> Iterator[Finding]:
    """Handlers of everything which do not end in a plain `raise`, and suppress(Exception)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            is_raised_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if not is_raised_again and (node.type is None or names_everything(node.type)):
                yield node.lineno, "catches everything"
        for argument in arguments_of("suppress", node):
            if names_everything(argument):
                yield argument.lineno, "suppresses everything"


def names_everything(node: ast.expr) -> bool:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(ast.unparse(part).rpartition(".")[2] in ("Exception", "BaseException") for part in parts)


def long_functions(_: Path, source: str) -> Iterator[Finding]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def missing_docstrings(path: Path, source: str) -> Iterator[Finding]:
    is_empty_package = path.name == "__init__.py" and not source.strip()
    is_test = path.name.startswith("test_")  # the names of its tests say what it is for
    if not is_empty_package and not is_test and not ast.get_docstring(ast.parse(source)):
        yield 1, "has no module docstring"


def loose_ends(_: Path, source: str) -> Iterator[Finding]:
    for number, line in enumerate(source.splitlines(), start=1):
        if LOOSE_ENDS.search(line):
            yield number, "leaves something to do; open an issue instead"


Check = Callable[[Path, str], Iterator[Finding]]
CHECKS: list[Check] = [
    forbidden_imports,
    imports_of_other_rooms,
    kernels_outside_ops,
    broad_excepts,
    long_functions,
    missing_docstrings,
    loose_ends,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_whole_source_keeps_to_the_rules(check):
    found = [
        f"{path}:{line} {says}"
        for path in FILES
        for line, says in check(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert found == []


def own_imports(package: str, *, in_functions: bool) -> Graph:
    files = [path for path in FILES if path.parts[0] == package]
    return import_graph({path: (ROOT / path).read_text(encoding="utf-8") for path in files}, in_functions=in_functions)


@pytest.mark.parametrize("package", ["skyrl_gym", "skyrl_train", "integrations"])
def test_nothing_imports_in_a_circle_not_even_inside_a_function(package):
    assert list(circles(own_imports(package, in_functions=True))) == []


def test_a_room_imports_from_its_own_line_of_the_order_and_from_those_above():
    assert list(imports_from_below(own_imports("skyrl_train", in_functions=False))) == []


def imports_from_below(graph: Graph) -> Iterator[str]:
    level = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    for module, targets in graph.items():
        for target in sorted(targets):
            room, other = (name.split(".")[1] for name in (f"{module}.", f"{target}."))
            if room and other and level[other] > level[room]:
                yield f"{module} imports {target}, which stands below it"


def test_every_room_of_skyrl_train_has_its_place_in_the_order():
    rooms = {path.parts[1].removesuffix(".py") for path in FILES if path.parts[0] == "skyrl_train"} - {"__init__"}
    named = [room for line in ORDER for room in line]
    assert sorted(named) == sorted(rooms)


def test_every_package_is_looked_at():
    assert {"skyrl_gym", "skyrl_train", "integrations", "tests"} <= {path.parts[0] for path in FILES}


def lines_found(check: Check, path: str, source: str) -> list[int]:
    return [line for line, _ in check(Path(path), source)]


@pytest.mark.parametrize(
    ("path", "source", "is_wrong"),
    [
        ("skyrl_gym/core.py", "import torch.nn", True),
        ("skyrl_gym/envs/a.py", "def f():\n    from transformers import AutoModel", True),
        ("skyrl_gym/core.py", "from skyrl_train.types import Prompt", True),
        ("skyrl_gym/core.py", "import numpy, torchless", False),
        ("skyrl_train/trainer.py", "import ray", True),
        ("skyrl_train/trainer.py", "importlib.import_module('ray.util')", True),
        ("skyrl_train/cluster/actors.py", "import ray", False),
        ("skyrl_train/engine/torch/engine.py", "from vllm import LLM", True),
        ("skyrl_train/engine/vllm/engine.py", "from vllm import LLM", False),
        ("skyrl_train/engine/vllm/settings.py", "from vllm import LLM", True),
        ("skyrl_train/trainer.py", "from integrations.openenv import env", True),
        ("skyrl_train/trainer.py", "from .integrations import openenv", False),
        ("skyrl_train/engine/base.py", "from ...integrations import openenv", True),
        ("integrations/openenv/env.py", "import skyrl_train", False),
    ],
)
def test_imports_are_told_apart(path, source, is_wrong):
    assert bool(lines_found(forbidden_imports, path, source)) is is_wrong


@pytest.mark.parametrize(
    ("path", "source", "is_wrong"),
    [
        ("skyrl_train/policy/blocks.py", "from skyrl_train.ops import ops_for", False),
        ("skyrl_train/policy/blocks.py", "from skyrl_train.ops.cpu import cpu_ops", True),
        ("skyrl_train/learner/adamw.py", "from skyrl_train.ops.cpu.passes import passes_for", True),
        ("skyrl_train/engine/torch/kv_cache.py", "from skyrl_train.ops import cuda_decode", True),
        ("skyrl_train/engine/torch/kv_cache.py", "from skyrl_train.ops.cuda import has_flash", False),
        ("skyrl_train/learner/adamw.py", "if self._kernels is None:\n    pass", True),
        ("skyrl_train/learner/adamw.py", "import triton", True),
        ("skyrl_train/ops/cpu/cpu_ops.py", "from skyrl_train.ops.cpu.passes import passes_for", False),
        ("tests/skyrl_train/ops/test_passes.py", "from skyrl_train.ops.cpu.passes import passes_for", False),
    ],
)
def test_kernels_are_known_to_one_room(path, source, is_wrong):
    assert bool(lines_found(kernels_outside_ops, path, source)) is is_wrong


def test_rooms_import_only_what_stands_above_them():
    seen: set[str] = set()
    for room, allowed in ROOMS.items():
        assert {name.partition(".")[0] for name in allowed} <= seen
        seen.add(room)


def test_every_folder_of_the_integration_is_a_room_or_the_front():
    folders = {path.parts[2] for path in FILES if path.parts[:2] == ("integrations", "openenv") and len(path.parts) > 3}
    assert folders == ROOMS.keys() - {"config"} | FRONT


@pytest.mark.parametrize(
    ("path", "source", "is_wrong"),
    [
        ("client/session.py", "from integrations.openenv.client.errors import SessionLost", False),
        ("client/session.py", "from integrations.openenv.config import OpenEnvConfig", True),
        ("client/session.py", "from integrations.openenv import pool", True),
        ("config.py", "from integrations.openenv.client import errors", True),
        ("hosting/launch.py", "from integrations.openenv.pool.fleet import Fleet", True),
        ("pool/fleet.py", "from integrations.openenv.hosting.launch import start_server", False),
        ("catalog/entry.py", "from integrations.openenv.hosting.source import ServerSource", False),
        ("catalog/entry.py", "from integrations.openenv.hosting.launch import start_server", True),
        ("servers/echo_env.py", "from integrations.openenv.clients import EchoEnv", True),
        ("env.py", "from integrations.openenv.pool.server_pool import shared_pool", False),
    ],
)
def test_what_is_above_a_room_is_told_from_what_is_not(path, source, is_wrong):
    assert bool(lines_found(imports_of_other_rooms, f"integrations/openenv/{path}", source)) is is_wrong


@pytest.mark.parametrize(
    ("handler", "is_wrong"),
    [
        ("except:\n    pass", True),
        ("except Exception:\n    pass", True),
        ("except (ValueError, BaseException) as error:\n    raise RuntimeError from error", True),
        ("except builtins.Exception:\n    print(1)", True),
        ("except BaseException:\n    close()\n    raise", False),
        ("except ValueError:\n    pass", False),
    ],
)
def test_broad_handlers_are_told_from_narrow_ones(handler, is_wrong):
    assert bool(lines_found(broad_excepts, "a.py", f"try:\n    f()\n{handler}")) is is_wrong


def test_suppressing_everything_is_a_broad_handler():
    source = "with suppress(OSError):\n    f()\nwith contextlib.suppress(Exception):\n    f()"
    assert lines_found(broad_excepts, "a.py", source) == [3]


def test_a_function_may_have_a_hundred_lines_and_no_more():
    def function(lines: int) -> str:
        return "async def f():\n" + "    x = 1\n" * (lines - 1)

    assert lines_found(long_functions, "a.py", function(100)) == []
    assert lines_found(long_functions, "a.py", "\n" + function(101)) == [2]


def test_only_an_empty_package_file_needs_no_docstring():
    assert lines_found(missing_docstrings, "skyrl_gym/__init__.py", "") == []
    assert lines_found(missing_docstrings, "skyrl_gym/__init__.py", "import x") == [1]
    assert lines_found(missing_docstrings, "skyrl_gym/core.py", "") == [1]
    assert lines_found(missing_docstrings, "skyrl_gym/core.py", '"""What it is for."""') == []


def test_loose_ends_are_found_as_words():
    assert lines_found(loose_ends, "a.py", "x = 1  # TO" + "DO later\nTODOS = 2") == [1]


def circles_of(sources: dict[str, str]) -> list[list[str]]:
    files = {Path(f"a/{name}.py"): source for name, source in sources.items()}
    return list(circles(import_graph(files, in_functions=True)))


@pytest.mark.parametrize(
    ("first", "second", "is_circle"),
    [
        ("import a.second", "import a.first", True),
        ("from a import second", "from .first import name", True),
        ("import a.second", "def f():\n    from a.first import name", True),
        ("import a.second", "class C:\n    import a.first", True),
        ("import a.second", "if TYPE_CHECKING:\n    import a.first", False),
        ("import a.second", "if TYPE_CHECKING:\n    pass\nelse:\n    import a.first", True),
        ("import a.second", "import a.firstly, b.first", False),
    ],
)
def test_a_circle_of_two_files_is_found(first, second, is_circle):
    assert circles_of({"first": first, "second": second}) == ([["a.first", "a.second"]] if is_circle else [])


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"x": "import a.y", "y": "import a.z", "z": "import a.x"}, ["a.x", "a.y", "a.z"]),
        ({"one": "import a.x.two", "x/two": "", "x/three": "import a.one"}, ["a.one", "a.x"]),
        ({"x/one": "import a.x.two", "x/two": "import a.x.one"}, ["a.x.one", "a.x.two"]),
        ({"x/__init__": "import a.x.one", "x/one": "from a.x import name"}, ["a.x.__init__", "a.x.one"]),
    ],
)
def test_circles_of_three_files_through_a_folder_and_with_its_own_package_are_found(sources, circle):
    assert circles_of(sources) == [circle]


def test_imports_in_functions_count_for_circles_only():
    files = {
        Path("skyrl_train/types.py"): "def f():\n    import skyrl_train.run.run",
        Path("skyrl_train/run/run.py"): "",
    }
    assert list(imports_from_below(import_graph(files, in_functions=False))) == []
    [said] = imports_from_below(import_graph(files, in_functions=True))
    assert said == "skyrl_train.types imports skyrl_train.run.run, which stands below it"


WALK_ROW = re.compile(r"\| \d+ \| `(?P<call>.+?)` \| (?:`(?P<file>.+?)`|the same) \|")


def test_the_walk_from_the_readme_to_the_gradient_is_short_and_each_function_on_it_names_the_next():
    """Two hops are not in the caller's own text: see CONTRIBUTING."""
    lines = (ROOT / ".github/CONTRIBUTING.md").read_text().splitlines()
    rows = [found for line in lines if (found := WALK_ROW.match(line))]
    calls, files = [row["call"] for row in rows], [row["file"] for row in rows]
    files = [file or files[i - 1] for i, file in enumerate(files)]
    assert 8 <= len(calls) <= 12
    assert len(set(files)) <= 7
    *functions, backward = zip(calls, files, strict=True)
    text = {call: source_of(file, call) for call, file in functions}
    assert ".backward()" in backward[0]
    assert "(loss + regularization).backward()" in text["accumulate_gradient"]
    text["accumulate_gradient"] += source_of("skyrl_train/learner/ranks.py", "Ranks.forward")
    hops = {
        "Trainer.step": "self.learner.update",
        "TorchLearner.update": "self._accumulate_gradient",
        "TorchLearner._accumulate_gradient": "accumulate_gradient",
        "accumulate_gradient": "batch_logprobs",
        "Objective.policy_loss": "weighted_sum",
    }
    for caller, called in hops.items():
        assert f"{called}(" in text[caller] or f"{called}," in text[caller], f"{caller} does not call {called}"
    assert "objective.policy_loss(" in text["accumulate_gradient"]
    assert "call.flat()" in text["Objective.policy_loss"]
    assert "self.function" in source_of("skyrl_train/algorithms/loss_style.py", "LossCall._answered")
    assert '@register_policy_loss("regular")' in text["clipped_surrogate"]


def source_of(file: str, name: str) -> str:
    """Return the text of "function" or "Class.method", its decorators included."""
    source = (ROOT / file).read_text()
    within: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        [found] = [node for node in within if getattr(node, "name", None) == part]
        assert isinstance(found, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        within = found.body
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : found.end_lineno])


def test_no_two_classes_have_one_name():
    """But the two ends of OpenEnv's wire: an action and an observation of its client and those of its server."""
    places: dict[str, list[Path]] = {}
    for path in FILES:
        if path.parts[0] in ("skyrl_gym", "skyrl_train", "integrations"):
            for node in ast.parse((ROOT / path).read_text()).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(path)
    twice = {name: found for name, found in places.items() if len(found) > 1}
    ends = [name for name, found in twice.items() if {path.parts[2] for path in found} == {"catalog", "servers"}]
    assert all(name.endswith(("Action", "Observation")) for name in ends)
    assert {name: found for name, found in twice.items() if name not in ends} == {}
