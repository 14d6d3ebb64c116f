"""Build of an environment's image: our own server and its engine, in the versions installed here.

The build context is a tar made in memory. Equal inputs give equal bytes, so Docker's cache holds as long as nothing
changed: what all servers need is installed once for all images, an engine once for all changes of our code.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tomllib
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from integrations.openenv.catalog import CatalogEntry
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.hosting.server_process import REPOSITORY_ROOT
from integrations.openenv.images.long_command import run_long_command

BASE_IMAGE = "python:3.11-slim"
DOCKERFILE = REPOSITORY_ROOT / "integrations" / "openenv" / "images" / "Dockerfile"

# What openenv-core's server imports. Its other dependencies (gradio, openai, ...) are for its web page and tools.
SERVER_PACKAGES = ("fastapi", "uvicorn", "pydantic", "websockets", "requests", "fastmcp")
# Engines that stand among pyproject.toml's dependencies and not in an extra.
ENGINES_WITHOUT_EXTRA = {"coding_env": ("smolagents",)}
# Dependencies of an engine's package that no server of ours imports.
UNUSED = {
    "openspiel_env": {"numpy", "scipy", "absl-py", "ml-collections"},  # of its Python games; ours are the C++ ones
    "sumo_rl_env": {"pillow"},
    "finrl_env": {"scipy"},  # skfolio is there for its price file and never imported
}
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}


async def build_image(
    entry: CatalogEntry, tag: str, *, base_image: str = BASE_IMAGE, timeout_s: float = 1800.0
) -> None:
    """Build and tag the image. On failure the tag does not move, and OpenEnvError has the build's last lines."""
    arguments = {"BASE_IMAGE": base_image, "ENVIRONMENT": entry.name, "SERVER_MODULE": entry.server_module}
    command = ["docker", "build", "--tag", tag]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    await run_long_command(*command, "-", stdin=build_context(entry), timeout_s=timeout_s)


def context_hash(entry: CatalogEntry) -> str:
    """Return a hash of the build context: it changes when the image would."""
    return hashlib.sha256(build_context(entry)).hexdigest()[:12]


def build_context(entry: CatalogEntry) -> bytes:
    """Return the tar that `docker build -` reads."""
    server = installed_closure(SERVER_PACKAGES)
    server["openenv-core"] = _installed_version("openenv-core")
    engine = installed_closure(engine_packages(entry), left_out=UNUSED.get(entry.name, set()))
    system = DOCKERFILE.parent / f"{entry.name}.sh"
    files = {
        "Dockerfile": DOCKERFILE.read_bytes(),
        "system.sh": system.read_bytes() if system.exists() else b"",
        "requirements/server.txt": _requirements(server),
        "requirements/engine.txt": _requirements({name: engine[name] for name in engine if name not in server}),
    }
    for path in _sources():
        files[path.relative_to(REPOSITORY_ROOT).as_posix()] = path.read_bytes()
    return _tar(files)


def engine_packages(entry: CatalogEntry) -> list[str]:
    """Return the names of the packages of our server's engine."""
    if entry.extra is None:
        return list(ENGINES_WITHOUT_EXTRA.get(entry.name, ()))
    project = tomllib.loads((REPOSITORY_ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line).name for line in project["optional-dependencies"][entry.extra]]


def installed_closure(names: Iterable[str], left_out: Collection[str] = ()) -> dict[str, str]:
    """Return {name: version} of these packages and their dependencies on Linux that are installed here.

    Dependencies that are not installed were excluded by pyproject.toml's overrides; the image needs none of them.
    """
    waiting = [Requirement(name) for name in names]
    versions = {requirement.name: _installed_version(requirement.name) for requirement in waiting}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in left_out or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        versions[name] = found.version
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({**LINUX, "extra": extra}) for extra in extras or {""}
            ):
                waiting.append(needed)
    return versions


def _installed_version(name: str) -> str:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        raise OpenEnvError(
            f"{name} is not installed here, and the image takes its versions from this machine; type first: "
            "uv sync --inexact --extra envs"
        ) from None


def _requirements(versions: dict[str, str]) -> bytes:
    return "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)).encode()


def _sources() -> list[Path]:
    gym = REPOSITORY_ROOT / "skyrl_gym"
    first = [REPOSITORY_ROOT / "integrations" / "__init__.py", gym / "contract.py", gym / "tool_calls.py"]
    return sorted([*first, *DOCKERFILE.parents[1].rglob("*.py"), *(gym / "walls").glob("*.py")])


def _tar(files: dict[str, bytes]) -> bytes:
    """Return the files as a tar without times and owners, so that equal files give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
