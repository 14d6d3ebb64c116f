"""Python's garbage collector while many episodes are played: it looks at what a round made, and more rarely at all."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

# Collections of the middle generation between two of everything. Python's own number is 10: with 4,096 episodes under
# way a quarter of the driver's time went into collections that found nothing, each of which held up every episode.
MIDDLE_COLLECTIONS = 100

_num_rounds = 0
_before: tuple[int, int, int] = gc.get_threshold()


@contextmanager
def rare_collections() -> Generator[None]:
    """Leave out, until the block ends, the objects that exist now (the libraries' above all), and collect less often.

    Blocks may overlap: the first one begins it and the last one ends it. Then everything is looked at again.
    """
    global _num_rounds, _before
    if _num_rounds == 0:
        _before = gc.get_threshold()
        gc.freeze()
        gc.set_threshold(_before[0], _before[1], max(_before[2], MIDDLE_COLLECTIONS))
    _num_rounds += 1
    try:
        yield
    finally:
        _num_rounds -= 1
        if _num_rounds == 0:
            gc.set_threshold(*_before)
            gc.unfreeze()
