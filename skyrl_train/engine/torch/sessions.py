"""Keys and values kept between the turns of an episode, so that the next turn computes only what is new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from skyrl_train.engine.torch.kv_cache import Saved
from skyrl_train.engine.torch.prefix_sharing import PrefixIndex, common_prefix


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens of a session's last turn, with their keys and values."""

    tokens: list[int]
    saved: Saved


class KeptSessions:
    """Keeps at most `budget` bytes; the session that was kept longest ago goes first."""

    def __init__(self, budget: int, drop: Callable[[Saved], None]) -> None:
        """drop: is told what is kept no longer."""
        self.budget, self._drop = budget, drop
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._prefixes: PrefixIndex[Kept] = PrefixIndex()
        self._num_bytes = 0

    def keep(self, session_id: str, kept: Kept) -> None:
        self.forget(session_id)
        self._kept[session_id] = kept
        self._prefixes.add(kept.tokens, kept)
        self._num_bytes += kept.saved.num_bytes
        while self._num_bytes > self.budget:
            self.forget_oldest()

    def forget(self, session_id: str) -> None:
        if (kept := self._kept.pop(session_id, None)) is not None:
            self._prefixes.remove(kept.tokens, kept)
            self._num_bytes -= kept.saved.num_bytes
            self._drop(kept.saved)

    def forget_oldest(self) -> bool:
        """Forget the session that was kept longest ago. False: there is none."""
        if not self._kept:
            return False
        self.forget(next(iter(self._kept)))
        return True

    def clear(self) -> None:
        while self.forget_oldest():
            pass

    def longest_prefix(self, session_id: str, prompt_ids: list[int]) -> tuple[int, Kept | None]:
        """Return how many tokens of the prompt some session has, its own first among equals, and what that one left."""
        own = self._kept.get(session_id)
        best = (0, None) if own is None else (common_prefix(own.tokens, prompt_ids), own)
        other = self._prefixes.longest(prompt_ids) if best[0] < len(prompt_ids) - 1 else best
        return other if other[0] > best[0] else best
