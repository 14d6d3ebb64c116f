"""A home of the tests' own, so that no run writes into that of the person who runs them.

Its hidden folders (.cache with packages and converted models, .docker, .config) are links to the real ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

REAL_HOME = "HOME_WITHOUT_TESTS"


def move_in() -> Path | None:
    """Set HOME to a new folder and return it; None in a process of tests whose parent has done so already."""
    if REAL_HOME in os.environ:
        return None
    real, home = Path.home(), Path(tempfile.mkdtemp(prefix="skyrl-tests-home-"))
    (real / ".cache").mkdir(exist_ok=True)
    for hidden in real.glob(".*"):
        (home / hidden.name).symlink_to(hidden)
    os.environ.update({REAL_HOME: str(real), "HOME": str(home)})
    return home


def move_out(home: Path) -> None:
    os.environ["HOME"] = os.environ.pop(REAL_HOME)
    shutil.rmtree(home, ignore_errors=True)  # it removes links, not what they point to
