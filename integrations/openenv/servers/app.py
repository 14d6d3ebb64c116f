"""Server for an OpenEnv environment of other authors, unmodified: a folder made by `openenv init`, or module:app.

python -m integrations.openenv.servers.app ./my_env --port 8000
python -m integrations.openenv.servers.app my_package.server.app:app
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from integrations.openenv.servers.serving import serve_as, server_parser

WITH_GRADIO = "SKYRL_SERVE_WITH_GRADIO"  # set when an app that needs gradio (see servers/__init__.py) is started again
DEFAULT_APP = "server.app:app"


def load_app(target: str) -> Any:
    """Return the ASGI app of a folder or of module:attribute; ValueError says what is missing."""
    folder = Path(target)
    if not folder.is_dir():
        return _attribute(target)
    module, _, attribute = _app_of(folder).partition(":")
    tried = []
    if folder.name.isidentifier() and (folder / "__init__.py").is_file():
        tried.append((str(folder.parent), f"{folder.name}.{module}"))  # the app may import ..models
    tried.append((str(folder), module))  # as `uvicorn server.app:app` in the folder does
    failures = []
    for on_path, name in tried:
        sys.path.insert(0, on_path)
        try:
            return _attribute(f"{name}:{attribute or 'app'}")
        except ImportError as failed:
            failures.append(f"import {name}: {failed}")
            sys.path.remove(on_path)
    raise ValueError(
        f"{folder} cannot be imported ({'; '.join(failures)}). What its pyproject.toml depends on must be installed "
        "beside this package: uv pip install NAME ..."
    )


def _app_of(folder: Path) -> str:
    """Return `app` of the folder's openenv.yaml, or DEFAULT_APP."""
    settings = folder / "openenv.yaml"
    read = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
    app = read.get("app", DEFAULT_APP) if isinstance(read, dict) else None
    if not isinstance(app, str):
        raise ValueError(f"{settings}: app={app!r} must look like {DEFAULT_APP}")
    return app


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ValueError(f"{path}: {module} has no {name!r}")
    return getattr(found, name)


def main() -> None:
    parser = server_parser("Serve an OpenEnv environment as its authors wrote it.")
    parser.add_argument("target", help="a folder with openenv.yaml or server/app.py, or package.module:app")
    parser.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="for its environment")
    arguments = parser.parse_args()
    os.environ.update(dict(variable.split("=", 1) for variable in arguments.variable))

    def make_app(max_sessions: int) -> Any:
        os.environ.setdefault("MAX_CONCURRENT_ENVS", str(max_sessions))  # many apps read their limit from it
        if WITH_GRADIO in os.environ:
            del sys.modules["gradio"]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is only for the server's address
                return load_app(arguments.target)
        except (ValueError, ImportError) as wrong:
            if "gradio" in str(wrong) and WITH_GRADIO not in os.environ:
                os.execve(sys.executable, sys.orig_argv, {**os.environ, WITH_GRADIO: "1"})
            sys.exit(str(wrong))

    serve_as(arguments, make_app)


if __name__ == "__main__":
    main()
