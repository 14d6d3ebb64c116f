"""No text of a model, a server or a data set steers the terminal."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from rich.console import Console

from skyrl_train.run.progress import RunProgress, print_line
from skyrl_train.visible import log_to, visible

ESCAPES = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;ZWNobw==\x07", "\x9b2J", "\x1b[2K\r all is well", "a\x08\x08b",
    "\x7f", "\u202egnp.exe", "\u2066", "\ufeff", "\x00", "\ud800",
]  # fmt: skip
HARMFUL = {character for text in ESCAPES for character in text if not character.isprintable()}


def is_harmless(text: str) -> bool:
    return not HARMFUL & set(text)


@pytest.mark.parametrize("text", ESCAPES, ids=ascii)
def test_nothing_steers_the_terminal(text: str) -> None:
    assert is_harmless(visible(text))
    assert visible("plain\n\ttext äß漢🙂") == "plain\n\ttext äß漢🙂"


@pytest.mark.parametrize("text", ESCAPES[:-1], ids=ascii)
def test_log_lines_and_their_tracebacks_are_visible(text: str) -> None:
    to = io.StringIO()
    log_to(to)
    try:
        logger.info(f"the server says {text}")
        logger.opt(exception=ValueError(text)).error("failed")
    finally:
        log_to(sys.stderr)
    assert is_harmless(to.getvalue())
    assert to.getvalue().count("the server says") == 1
    assert "ValueError" in to.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_above_the_bars_are_visible(terminal: bool) -> None:
    to = io.StringIO()
    console = Console(file=to, force_terminal=terminal, color_system=None, width=200)
    print_line(f"says {ESCAPES[1]}", console)
    RunProgress(1, console=Console(file=to, width=200)).print(f"says {ESCAPES[1]}\n")
    assert is_harmless(to.getvalue())
    assert to.getvalue().count("␛]0;title␇") == 2


def test_what_ends_a_process_and_what_libraries_log_is_visible() -> None:
    code = """
import logging
from skyrl_train.visible import make_errors_visible
make_errors_visible()
logging.getLogger("library").warning("says \\x1b[2J")
from loguru import logger
logger.warning("logs \\x1b[2J")
raise ExceptionGroup("two", [ValueError("\\x1b[31m"), RuntimeError("\\x9b2J")])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "says ␛[2J" in ended.stderr
    assert "logs ␛[2J" in ended.stderr
    assert "ValueError: ␛[31m" in ended.stderr
    assert is_harmless(ended.stderr)


def test_a_refusal_is_visible(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from skyrl_train.entrypoints.main_base import main

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert main(["trainer.\x1b[31m=1"]) == 2
    assert is_harmless(capsys.readouterr().err)


COMMAND_LINES = [
    ["config"],
    ["doctor"],
    ["check", "x"],
    ["play", "x"],
    ["chat", "m"],
    ["serve", "m"],
    ["eval", "x"],
    ["export", "x"],
    ["view"],
]


@pytest.mark.parametrize("words", [*COMMAND_LINES, ["runs"], ["runs", "compare", "a", "b"], ["train"]], ids=" ".join)
def test_what_a_command_line_is_refused_for_is_visible(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A shell puts the names of files there."""
    from skyrl_train.commands.main import main

    with pytest.raises(SystemExit) as ended:
        main([*words, "--\x1b[2J\x9b31m"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "␛[2J" in said
    assert is_harmless(said)


def test_play_shows_what_a_server_says_without_its_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    from integrations.openenv.commands import arguments, play

    to = io.StringIO()
    console = Console(file=to, force_terminal=True, color_system=None, width=200)
    messages: Any = [{"role": "user", "content": f"[bold]{text}"} for text in ESCAPES[:-1]]
    play._show_task(messages, console)
    assert is_harmless(to.getvalue())
    assert "[bold]␛[31mred" in to.getvalue()
    assert arguments.shown("[red]\x1b") == "\\[red]␛"


def test_only_one_function_writes_untrusted_text_for_rich() -> None:
    """`rich.markup.escape` alone lets terminal escapes through."""
    root = Path(__file__).parents[2]
    users = [
        path.relative_to(root).as_posix()
        for folder in ("skyrl_train", "integrations")
        for path in (root / folder).rglob("*.py")
        if "rich.markup import escape" in path.read_text()
    ]
    assert users == ["integrations/openenv/commands/arguments.py"]
    assert logging.lastResort is not None
