"""Ctrl-C, SIGTERM and SIGHUP: every command ends with one line and the shell's status, and leaves nothing half done."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from skyrl_train.commands.main import COMMANDS, main, offered
from skyrl_train.policy import lora_files
from skyrl_train.run import model_folder
from skyrl_train.signals import ENDING, ends_when_asked

ROOT = Path(__file__).parents[3]
SIGNALS = [signal.SIGINT, *ENDING]
CPU = ["trainer.device=cpu", "trainer.bf16=false"]

# The signal comes as soon as the module of the command is looked for.
AT_THE_START = """
import os, sys
from skyrl_train.commands import main

module, how, *sys.argv[1:] = sys.argv[1:]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(how))

sys.meta_path.insert(0, Finder())
sys.exit(main.program())
"""
SWALLOWED = """
import os, signal, sys
from skyrl_train.signals import ends_when_asked

def main():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    except KeyboardInterrupt:
        raise ImportError("a half of it is there")
    return 0

sys.exit(ends_when_asked(main))
"""
DROPPED = SWALLOWED.replace('raise ImportError("a half of it is there")', "pass")
IN_MADE_CODE = """
import os, sys
from skyrl_train.signals import ends_when_asked

sys.exit(ends_when_asked(lambda: exec("os.kill(os.getpid(), int(sys.argv[1]))")))
"""
AT_THE_END = """
import atexit, os, signal, sys
from skyrl_train.signals import ends_when_asked

atexit.register(os.kill, os.getpid(), int(sys.argv[1]))
sys.exit(ends_when_asked(lambda: 0))
"""


def reacts() -> None:
    """Undo what a shell sets for processes in the background."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        env=environment, capture_output=True, text=True, check=False, preexec_fn=reacts,
    )  # fmt: skip


@pytest.mark.parametrize(("number", "name"), list(enumerate(offered())))
def test_a_signal_at_the_start_ends_a_command_in_one_line(number, name):
    how = SIGNALS[number % len(SIGNALS)]
    done = run(AT_THE_START, COMMANDS[name].module, str(int(how)), name, "x")
    assert (done.returncode, done.stdout) == (128 + how, "")
    assert done.stderr.splitlines()[-1].endswith("interrupted")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("script", [SWALLOWED, DROPPED])
def test_a_library_that_drops_the_signal_or_takes_it_for_a_failed_import_does_not_hide_it(script, how):
    done = run(script, str(int(how)))
    assert (done.returncode, done.stderr) == (128 + how, "interrupted\n")


def test_ctrl_c_while_code_is_made_from_a_text_does_not_change_the_status_of_a_module(tmp_path):
    (tmp_path / "made.py").write_text(IN_MADE_CODE)
    words = [sys.executable, "-m", "made", str(int(signal.SIGINT))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, preexec_fn=reacts)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_signal_while_the_interpreter_ends_makes_no_traceback():
    done = run(AT_THE_END, str(int(signal.SIGINT)))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")  # 130 in a shell


class Terminal:
    """A command in a terminal of its own, whose Ctrl-C it gets."""

    def __init__(self, *words: str) -> None:
        self.end, inside = pty.openpty()
        script = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        script += "from skyrl_train.commands.main import program; raise SystemExit(program())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *words], stdin=inside, stdout=inside, stderr=inside,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}, start_new_session=True, preexec_fn=reacts,
        )  # fmt: skip
        os.close(inside)

    def read_until(self, words: str, again: bytes = b"") -> str:
        """Return what the command prints until the words, or to its end; it has a minute for each piece.

        again: typed once more when nothing has come for 20 seconds.
        """
        text = ""
        while words not in text:
            if not select.select([self.end], [], [], 20 if again else 60)[0]:
                if again:
                    os.write(self.end, again)
                    again = b""
                    continue
                self.process.kill()
                raise AssertionError(f"still waiting for {words!r}: {text}")
            try:
                text += os.read(self.end, 65536).decode()
            except OSError:  # it has ended
                break
        return text

    def end_with(self, how: int) -> tuple[int, str]:
        """Return the status after the signal, and what the command said then.

        Ctrl-C is typed again if there is no answer, as a person would: Python's line editing misses one that comes in
        the moment in which it begins to wait.
        """
        typed = b"\x03" if how == signal.SIGINT else b""
        if typed:
            os.write(self.end, typed)
        else:
            self.process.send_signal(how)
        said = self.read_until("interrupted", again=typed) + self.read_until("no such words")
        os.close(self.end)
        return self.process.wait(60), said


@pytest.mark.parametrize(
    ("words", "waits_for", "how"),
    [
        (["play", "arithmetic"], "1>", signal.SIGINT),
        (["play", "arithmetic"], "1>", signal.SIGTERM),
        (["view", "--no-open", "."], "ends it", signal.SIGINT),
        (["view", "--no-open", "."], "ends it", signal.SIGTERM),
        (["chat", "RUN", *CPU], "> ", signal.SIGINT),
        (["play", "tests.fakes:EvenEnv", "--model", "RUN"], "q: the end", signal.SIGINT),
    ],
)
def test_a_command_that_waits_is_ended_at_once(runs, words, waits_for, how):
    terminal = Terminal(*(str(runs["full"]) if word == "RUN" else word for word in words))
    before = terminal.read_until(waits_for)
    assert waits_for in before, before
    status, said = terminal.end_with(how)
    assert status == 128 + how, said
    assert said.replace("^C", "").split() == ["skyrl", f"{words[0]}:", "interrupted"]


@pytest.fixture
def usual_signals() -> Generator[None]:
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_interrupted_leaves_no_half_of_a_folder(
    how, runs, tmp_path, monkeypatch, capsys, usual_signals
):
    reacts()
    saved = lora_files.save_merged

    def interrupted_save(module, folder):
        saved(module, folder)
        assert list(folder.iterdir())
        os.kill(os.getpid(), how)

    monkeypatch.setattr(model_folder, "save_merged", interrupted_save)
    words = ["export", str(runs["full"]), "--output", str(tmp_path / "model")]
    assert ends_when_asked(lambda: main(words)) == 128 + how
    assert capsys.readouterr().err == "skyrl export: interrupted\n"
    assert list(tmp_path.iterdir()) == []
