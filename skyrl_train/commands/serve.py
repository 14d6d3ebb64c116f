"""`skyrl serve RUN|MODEL`: answer OpenAI's API with a trained model."""

from __future__ import annotations

import argparse
import asyncio
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from skyrl_train.commands.chat import add_model
from skyrl_train.files import user_path
from skyrl_train.visible import Parser

if TYPE_CHECKING:
    from skyrl_train.commands.trained import Talker

LONGEST_REPLY = 1024  # tokens, where a call names no other number


def main(words: list[str]) -> int:
    """Serve until Ctrl-C or a signal ends it, which is raised as KeyboardInterrupt."""
    options = parser().parse_intermixed_args(words)
    refuse_unless_free(options.host, options.port)
    from skyrl_train.commands.sources import source
    from skyrl_train.commands.trained import Talker
    from skyrl_train.console import lasting_output
    from skyrl_train.visible import make_errors_visible

    with lasting_output():
        make_errors_visible()
        talker = Talker(source(options.model, before=options.before, step=options.step), options.keys)
        try:
            asyncio.run(serve(talker, options))
        except asyncio.CancelledError:  # SIGTERM, SIGHUP
            raise KeyboardInterrupt from None
    return 0


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="skyrl serve",
        description="Serve a model with OpenAI's API, until Ctrl-C. At any host but this machine's own a key is "
        "needed: SKYRL_API_KEY, or one that is made and printed.",
    )
    add_model(made)
    made.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    made.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    made.add_argument("--name", help="of the model; default: the folder's")
    return made


def refuse_unless_free(host: str, port: int) -> None:
    """Raise ValueError for an address that cannot be served at, before a model is loaded."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port={port} must be from 0 to 65535")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        raise ValueError(f"cannot serve at {host}:{port} ({error.strerror}); give another --host or --port") from None


def served_name(model: str) -> str:
    """Return the name of a model's or a run's folder, "." and "~/run/" too, or the last part of a hub's name."""
    path = user_path(model)
    return (path.resolve() if path.is_dir() else path).name


async def serve(talker: Talker, options: argparse.Namespace) -> None:
    from skyrl_train.entrypoints.process import cancel_on_signals
    from skyrl_train.rollout.agents.endpoint import Endpoint
    from skyrl_train.rollout.sampling import sampling_params

    cancel_on_signals()
    engine = await talker.start()
    try:
        sampling = replace(sampling_params(talker.cfg.generator.sampling_params), max_tokens=LONGEST_REPLY)
        name = options.name or served_name(options.model)
        endpoint = Endpoint(engine, talker.chat_template, sampling, model=name, host=options.host, port=options.port)
        try:
            await endpoint.start()
            await asyncio.Event().wait()
        finally:
            endpoint.close()
    finally:
        await engine.close()
