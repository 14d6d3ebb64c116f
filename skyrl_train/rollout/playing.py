"""The state of a round that is being played: who waits for what, what failed, which limits cut episodes short."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from loguru import logger

from skyrl_train.rollout.agents.episode import AgentEpisode
from skyrl_train.rollout.episode import Cut, Episode
from skyrl_train.rollout.failures import Failures
from skyrl_train.rollout.lockstep import Lockstep
from skyrl_train.rollout.round import Round

STALL_REPORT_S = 60.0


class Playing:
    """One round under way. Several may be, each with its own."""

    def __init__(self, this_round: Round, *, in_lockstep: bool) -> None:
        self.round = this_round
        self.lockstep = Lockstep(this_round.num_episodes) if in_lockstep else None
        self.failures = Failures()
        self.cuts: Counter[Cut] = Counter()
        self._episodes: dict[str, Episode | AgentEpisode] = {}
        self._last_end = time.monotonic()

    def begins(self, episode: Episode | AgentEpisode) -> None:
        self._episodes[episode.task.id] = episode

    def ends(self, episode_id: str) -> None:
        """Forget an episode that has ended, in whichever way."""
        self._episodes.pop(episode_id, None)
        self._last_end = time.monotonic()
        if self.lockstep is not None:
            self.lockstep.leave(episode_id)

    async def report_stalls(self) -> None:
        """Log who waits for what whenever no episode has ended for a while."""
        while True:
            await asyncio.sleep(STALL_REPORT_S)
            idle_s = time.monotonic() - self._last_end
            if idle_s >= STALL_REPORT_S and self._episodes:
                logger.warning(f"{self.round.name}: no episode ended for {idle_s:.0f} s; {self.who_waits_for_what()}")

    def who_waits_for_what(self) -> str:
        waits: dict[str, list[str]] = {}
        for episode_id, episode in self._episodes.items():
            waits.setdefault(episode.waits_for, []).append(episode_id)
        shown = [f"{len(ids)} wait for {what} ({', '.join(ids[:4])}…)" for what, ids in sorted(waits.items())]
        return "; ".join(shown) or "no episode is being played"
