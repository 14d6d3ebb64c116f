"""Worker that runs one Python program of a model as `__main__`, after giving up every right that it does not need.

It is a worker of a nursery: stdin, stdout and stderr are files of the caller, and it ends with the program. The
standard library is imported before the fork: that saves time, and without bubblewrap no file can be opened afterwards.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import linecache
import os
import site
import sys
import threading
import traceback
from types import ModuleType, TracebackType
from typing import Any, NoReturn, Self

from skyrl_gym.walls.confinement import Rights, confine

FILE_BYTES = 64 << 20  # per file; stdout and stderr are files
FILE_NAME = "program.py"
PREPARE = "SKYRL_IMPORT_FOR_PROGRAMS"  # environment variable, set if no file can be opened later

# Modules that computing programs import, and those that these import at first use.
COMPUTING_MODULES = """
abc argparse array ast asyncio atexit base64 binascii bisect builtins calendar cmath codecs collections
collections.abc colorsys concurrent.futures contextlib copy copyreg csv ctypes dataclasses datetime decimal difflib
dis email.utils enum errno fractions functools gc getopt glob graphlib gzip hashlib heapq hmac html http
importlib.util inspect io ipaddress itertools json keyword linecache locale logging lzma math mmap numbers operator
os pathlib pickle platform pprint queue random re reprlib resource sched secrets select selectors shlex shutil
signal socket sqlite3 stat statistics string string.templatelib struct subprocess symtable sys tempfile textwrap
threading time timeit token tokenize traceback types typing unicodedata unittest urllib.parse uuid warnings weakref
xml.etree.ElementTree zlib zoneinfo _strptime encodings.ascii encodings.cp1252 encodings.idna encodings.latin_1
encodings.utf_16 encodings.utf_32 encodings.utf_8_sig
"""
PACKAGES = ["numpy", "numpy.fft", "numpy.linalg", "sympy", "sympy.tensor.tensor"]  # if installed


def make_answer(argument: dict[str, Any]) -> NoReturn:
    """Run the program and end. argument: {"code", "cpu_s", "reading": whether it may open files for reading}."""
    with contextlib.suppress(OSError):
        os.closerange(3, 1024)  # the session's socket, which is not used
    os.environ.clear()
    os.environ["LANG"] = "C.UTF-8"
    main = _main_module()
    confine(
        Rights(
            file_bytes=FILE_BYTES,
            cpu_s=argument["cpu_s"],
            threads=True,
            reading=argument["reading"],
        )
    )
    os._exit(_exit_code(argument["code"], main))


def _main_module() -> ModuleType:
    """Return the program's `__main__`, and give the process standard streams that have read and written nothing."""
    for name, descriptor, mode, buffering, errors in (
        ("stdin", 0, "r", -1, "surrogateescape"),
        ("stdout", 1, "w", -1, "surrogateescape"),
        ("stderr", 2, "w", 1, "backslashreplace"),
    ):
        stream = open(descriptor, mode, buffering, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [FILE_NAME]
    site.setquit()  # `exit` and `quit`, which -S left out
    main = sys.modules["__main__"] = ModuleType("__main__")
    return main


def _exit_code(code: str, main: ModuleType) -> int:
    """Run the program as Python would and return its exit code.

    That includes printing its exception, waiting for its threads, its atexit functions and flushing its output.
    """
    linecache.cache[FILE_NAME] = (len(code), None, code.splitlines(keepends=True), FILE_NAME)
    with _Ending() as program:
        exec(compile(code, FILE_NAME, "exec"), main.__dict__)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with _Ending() as output:
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None:
                stream.flush()
    main.__dict__.clear()
    gc.collect()  # closes, and so writes, files that the program left open
    return program.exit_code or output.exit_code


class _Ending:
    """Context that catches every exception, prints it as Python does, and keeps the resulting exit code."""

    exit_code = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> bool:
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            self.exit_code = (error.code or 0) & 0xFF
        elif isinstance(error, SystemExit):
            self.exit_code = 1
            print(error.code, file=sys.stderr)
        elif error is not None:
            self.exit_code = 1
            while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
                frames = frames.tb_next  # drop our own frames above the program's first
            traceback.print_exception(kind, error, frames)
        return True


for module in [*COMPUTING_MODULES.split(), *(PACKAGES if PREPARE in os.environ else [])]:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
