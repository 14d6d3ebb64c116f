"""The learner as it is on a machine without a C compiler."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest

from skyrl_train.ops.cpu import passes
from skyrl_train.ops.cpu.c_library import NoCompiler


def _refuse(*_: object) -> None:
    raise NoCompiler("there is no C compiler on the PATH")


@contextmanager
def without_compiler() -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "compiled_library", _refuse)
        passes._compiled.cache_clear()
        try:
            yield
        finally:
            passes._compiled.cache_clear()
