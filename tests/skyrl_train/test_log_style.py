"""One style for all that is said: by us, by libraries, in a terminal of any width and in a file."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loguru import logger

from skyrl_gym.envs.registration import deregister, register
from skyrl_train import console
from skyrl_train.entrypoints.main_base import main
from skyrl_train.log_style import INDENT, who_of, wrapped
from skyrl_train.visible import log_to, make_errors_visible
from tests.fakes import EvenEnv
from tests.skyrl_train.commands.conftest import settings
from tests.tiny_models import save_tiny_model

LINE = re.compile(r"\d\d:\d\d:\d\d (INFO   |WARNING|ERROR  ) [\w., ]+: \S")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Generator[list[str]]:
    """Let this process write to a terminal of so many columns. What it wrote stands in the list in the end."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    seen: list[bytes] = []
    written: list[str] = []

    def read() -> None:
        while True:
            try:
                seen.append(os.read(reading, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(writing, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        yield written
    finally:
        monkeypatch.undo()
        stream.close()
        reader.join()
        os.close(reading)
        log_to(sys.stderr)
        written += [line for line in re.split(r"[\r\n]+", CONTROL.sub("", b"".join(seen).decode())) if line]


@pytest.mark.parametrize("columns", [80, 100])
def test_all_lines_of_a_run_fit_the_terminal_and_what_is_copied_is_whole(columns, tmp_path: Path, monkeypatch) -> None:
    save_tiny_model(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}], "data_source": "even"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("even_commands", EvenEnv)
    try:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            keys = [*settings(Path("."), Path("a_run"), "full"), "trainer.eval_interval=1"]
            with terminal(columns, patch) as lines:
                assert main(keys) == 0
    finally:
        deregister("even_commands")
    assert [line for line in lines if len(line) > columns] == []
    assert sum(bool(LINE.match(line)) for line in lines) >= 4
    said = [line for line in lines if re.match(r"\d\d:", line)]
    assert [line for line in said if not LINE.match(line)] == []
    assert any("uv run skyrl chat a_run" in line for line in lines)
    assert any("uv run skyrl play --model a_run --before" in line for line in lines)


def test_where_pip_installed_the_command_it_is_typed_without_uv(monkeypatch) -> None:
    assert console.as_typed("skyrl chat a_run") == "uv run skyrl chat a_run"
    monkeypatch.setattr(console, "IN_CHECKOUT", False)
    assert console.as_typed("skyrl chat a_run") == "skyrl chat a_run"


def test_a_refusal_is_wrapped_in_a_terminal_and_its_command_is_not(monkeypatch) -> None:
    with monkeypatch.context() as patch, terminal(60, patch) as lines:
        keys = [
            "data.train_data=[a_file_with_a_long_name.jsonl]",
            "trainer.epocs=3",
            "trainer.ckpt_path=some/where/else",
        ]
        assert main(keys) == 2
    assert max(len(line) for line in lines if not line.startswith("  ")) <= 60
    [command] = [line for line in lines if line.startswith("  ")]
    assert command.endswith("trainer.ckpt_path=some/where/else trainer.epochs=3")


def test_libraries_and_warnings_speak_as_we_do(monkeypatch) -> None:
    to = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", to)
        patch.setattr(logging, "lastResort", None)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(sys, "excepthook", sys.excepthook)
        make_errors_visible()
        assert logging.lastResort is not None
        logging.lastResort.handle(logging.makeLogRecord({"name": "httpx.client", "levelno": 30, "levelname": "WARNING",
                                                         "msg": "slow {%s}\x1b[2J", "args": (1,)}))  # fmt: skip
        warnings.showwarning("old", DeprecationWarning, "/a/site-packages/torch/nn/x.py", 3)
        logger.warning("by us")
    log_to(sys.stderr)
    ended = [line.split(" ", 1)[1] for line in to.getvalue().splitlines()]
    assert ended == [
        "WARNING httpx: slow {1}␛[2J",
        "WARNING torch: DeprecationWarning: old",
        "WARNING tests: by us",
    ]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 7, ["one two", "  three"]),
        ("one two", None, ["one two"]),
        ("say `a b c d` now", 9, ["say", "  `a b c d`", "  now"]),
        ("`a.b` is old; say `c.d`.", 13, ["`a.b` is old;", "  say `c.d`."]),
        ("WARN    who: a b c", 14, ["WARN    who: a", "  b c"]),
        ("don`t break", 8, ["don`t", "  break"]),
        ("a/very/long/path is here", 8, ["a/very/long/path", "  is", "  here"]),
        ("This would start:\n  python -m x key=value", 10, ["This would", "  start:", "  python -m x key=value"]),
        ("first\n\nlast", 80, ["first", "", "last"]),
    ],
)
def test_lines_are_broken_between_words_only(text: str, width: int | None, lines: list[str]) -> None:
    assert wrapped(text, width, "  ").split("\n") == lines


def test_who_speaks_is_a_room_of_ours_or_a_package() -> None:
    assert [who_of(module) for module in ("skyrl_train.engine.pool", "integrations.openenv.x.y", "torch.nn")] == [
        "engine",
        "openenv",
        "torch",
    ]
    assert len(INDENT) == len("20:29:11 WARNING ")
