"""A hold on a checkpoint: the trainer that removes old ones leaves it while another process reads it.

Commands read a run while it trains (`chat`, `eval`, `export`), and with trainer.max_ckpts_to_keep=1 the checkpoint they
began to read is removed seconds later.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from skyrl_train.files import remove_folder
from skyrl_train.run.digests import DIGESTS


class HeldCheckpoint:
    """A shared lock on a checkpoint, until this object is dropped or the process ends."""

    def __init__(self, checkpoint: Path) -> None:
        """FileNotFoundError if the checkpoint, or its list of digests, has gone or goes now."""
        descriptor = os.open(checkpoint / DIGESTS, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileNotFoundError(f"{checkpoint} is being removed") from None
        except OSError:  # a file system without locks
            return
        if os.fstat(descriptor).st_ino != (checkpoint / DIGESTS).stat().st_ino:
            raise FileNotFoundError(f"{checkpoint} is another one by now")


def remove_unless_held(checkpoint: Path) -> None:
    """Remove a checkpoint. One that is held stays, and the next call removes it."""
    try:
        file = (checkpoint / DIGESTS).open("r+b")
    except OSError:  # damaged: nobody can read it
        remove_folder(checkpoint)
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        remove_folder(checkpoint)
