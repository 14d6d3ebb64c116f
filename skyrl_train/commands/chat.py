"""`skyrl chat RUN|MODEL`: talk to a model in the terminal, through its own chat template."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from skyrl_gym.reply import printable
from skyrl_train.visible import Parser

if TYPE_CHECKING:
    from skyrl_train.commands.trained import Talker
    from skyrl_train.engine.base import Engine, SamplingParams
    from skyrl_train.rollout.chat import Chat
    from skyrl_train.rollout.step_wise import StepWiseChat
    from skyrl_train.types import Message

HELP = "/reset begins a new conversation, /quit (or Ctrl-D) ends"


def main(words: list[str]) -> int:
    """Talk until the input ends; return 0."""
    options = parser().parse_intermixed_args(words)
    from skyrl_train.commands.sources import source
    from skyrl_train.commands.trained import Talker
    from skyrl_train.console import lasting_output
    from skyrl_train.visible import make_errors_visible

    with lasting_output():
        make_errors_visible()
        talker = Talker(source(options.model, before=options.before, step=options.step), options.keys)
        if options.system is not None:
            talker.chat_template.check(["system", "user"], grows=True)
        sampling = reply_sampling(options)
        with asyncio.Runner() as runner:
            _talk(runner, talker, sampling, options.system)
    return 0


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="skyrl chat", description=f"Talk to a model in the terminal: {HELP}.")
    add_model(made)
    made.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    made.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of one reply; default: 512")
    made.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest tokens")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling; default: 0")
    return made


def add_model(made: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model."""
    made.add_argument("model", metavar="RUN|MODEL", help="a run's folder (trainer.ckpt_path), a model's folder or name")
    made.add_argument("keys", nargs="*", default=[], metavar="KEY=VALUE", help="settings in place of the run's")
    made.add_argument("--before", action="store_true", help="the model that the run began with")
    made.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")


def reply_sampling(options: argparse.Namespace) -> SamplingParams:
    from skyrl_train.engine.base import SamplingParams

    return SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)


def _talk(runner: asyncio.Runner, talker: Talker, sampling: SamplingParams, system: str | None) -> None:
    """Read lines and print replies. Lines are read outside of the event loop, where Ctrl-C interrupts the reading."""
    from skyrl_train.visible import visible

    engine = runner.run(talker.start())
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(visible(f"{talker.source.label}: {HELP}"))
    chat, reply_ids, number = None, [], 0
    try:
        while (line := _read(on_terminal)) is not None and line != "/quit":
            if line == "/reset":
                chat, number = None, number + 1
                continue
            if not line:
                continue
            said: Message = {"role": "user", "content": line}
            if chat is None:
                chat = talker.chat_template.start([*opening, said])
            else:
                chat.append(reply_ids, [said])
            if len(chat.ids) >= engine.max_model_len:
                print(
                    f"the conversation has {len(chat.ids)} tokens, and the model reads {engine.max_model_len}: /reset"
                )
                chat = None
                continue
            reply_ids = runner.run(_reply(engine, talker, chat, sampling, f"chat_{number}"))
    finally:
        runner.run(engine.close())


async def _reply(
    engine: Engine, talker: Talker, chat: Chat | StepWiseChat, sampling: SamplingParams, session: str
) -> list[int]:
    """Print a reply as it is sampled, and return its tokens."""
    from skyrl_train.engine.base import Completion, Request
    from skyrl_train.rollout.agents.streaming import ShownText, in_pieces
    from skyrl_train.visible import visible

    shown, ids = ShownText(talker.tokenizer), []
    request = Request(chat.ids, sampling, session)
    async for piece in in_pieces(lambda told: engine.generate(replace(request, on_progress=told))):
        ids = piece.response_ids
        text = shown.rest(piece.text) if isinstance(piece, Completion) else shown.news(ids)
        print(visible(text), end="", flush=True)
    print()
    return ids


def _read(on_terminal: bool) -> str | None:
    """Return a line of the input, or None at its end. A terminal shows a prompt, and keeps the lines for the arrows."""
    if not on_terminal:
        line = sys.stdin.readline()
        return printable(line).strip() if line else None
    import readline  # noqa: F401 (input() edits lines with it)

    try:
        return printable(input("> ")).strip()
    except EOFError:
        return None
