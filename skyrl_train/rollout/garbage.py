"""Python's garbage collector while many episodes are played: it looks at what a round made, and more rarely at all."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

# With Python's own numbers (700, 10, 10) and 4,096 episodes under way a third of the driver's time went into
# collections that found nothing, each of which held up every episode. What a collection costs is the lists of tokens.
NEW_PER_EPISODE, MOST_NEW = 10, 50_000  # objects that may be new before they are looked at
YOUNG_COLLECTIONS = 50  # of the new objects, before those that outlived one are looked at as well

_num_rounds = 0
_before: tuple[int, int, int] = gc.get_threshold()


@contextmanager
def rare_collections(num_episodes: int) -> Generator[None]:
    """Leave out, until the block ends, the objects that exist now (the libraries' above all), and collect less often.

    Blocks may overlap: the first one begins it and the last one ends it. Then everything is looked at again.
    """
    global _num_rounds, _before
    if _num_rounds == 0:
        _before = gc.get_threshold()
        gc.freeze()
    _num_rounds += 1
    new = min(NEW_PER_EPISODE * num_episodes, MOST_NEW)
    if _before[0] > 0:  # 0: somebody has turned it off
        gc.set_threshold(max(new, gc.get_threshold()[0]), max(_before[1], YOUNG_COLLECTIONS), _before[2])
    try:
        yield
    finally:
        _num_rounds -= 1
        if _num_rounds == 0:
            gc.set_threshold(*_before)
            gc.unfreeze()
