"""The end of a process that was asked to end, by Ctrl-C or a signal, and the status that the shell sees then."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)  # beside Ctrl-C
_came: list[int] = []  # those that asked this process to end; the first one decides its status


def note(number: int) -> None:
    """Remember a signal that asks for the end."""
    _came.append(number)


def ignore_more() -> None:
    """Let nothing but Ctrl-C disturb the clean-up once the first signal has come. Call it in the main thread.

    Where a terminal is closed, SIGHUP comes twice: from the shell, and from the kernel when the shell ends.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def usual_signals_afterwards() -> Generator[None]:
    """Put back, after the block, what SIGTERM and SIGHUP did before: an event loop leaves its own at its end."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        for number, usual in before.items():
            if usual is not None and signal.getsignal(number) is not usual:
                signal.signal(number, usual)


def forget() -> None:
    """Forget the signals that came: a run begins, which none of them has ended."""
    _came.clear()


def interrupted(name: str = "") -> int:
    """Say in one line that a command was asked to end. Return its exit status: 130 after Ctrl-C, 143 after SIGTERM."""
    after_echo = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # the terminal has printed ^C
    print(f"{after_echo}{name}{': ' if name else ''}interrupted", file=sys.stderr)
    # After an interruption of code that was made from a text, as dataclasses make it, `python -m` ends itself by SIGINT
    # in the place of the status. More code from a text lets it forget that.
    exec("")
    return interrupted_status()


def interrupted_status() -> int:
    return 128 + (_came[0] if _came else signal.SIGINT)


def ends_when_asked(main: Callable[[], int]) -> int:
    """Run the program of this process and return its exit status. SIGTERM and SIGHUP interrupt it as Ctrl-C does.

    A signal that is ignored, as SIGHUP under nohup, stays ignored. While the interpreter ends, no signal makes a
    traceback any more.
    """
    ignored = [number for number in ENDING if signal.getsignal(number) is signal.SIG_IGN]
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        with _signals() as seen:
            try:
                status = main()
                return interrupted() if status == 0 and seen() else status  # a library dropped the interruption
            except KeyboardInterrupt:
                return interrupted()
            except Exception:
                if seen():  # a library took the interruption of its import for something else
                    return interrupted()
                raise
    finally:
        for number in (signal.SIGINT, *ENDING):
            if number not in ignored and (number in ENDING or signal.getsignal(number) is not signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def _signals() -> Generator[Callable[[], bool]]:
    """Yield a function that says whether a signal came within the block, as far as no event loop took it."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def seen() -> bool:
        try:
            return bool(set(os.read(reading, 4096)) & {signal.SIGINT, *ENDING})
        except BlockingIOError:
            return False

    try:
        yield seen
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _interrupt(number: int, frame: object) -> None:
    note(number)
    ignore_more()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # where an event loop was about to start
    raise KeyboardInterrupt
