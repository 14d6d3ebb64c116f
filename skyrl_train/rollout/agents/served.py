"""Rounds during which the endpoint serves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from skyrl_train.rollout.agents.endpoint import Endpoint
from skyrl_train.rollout.round import OnEpisode, Round, RoundPlayer
from skyrl_train.types import Group


class ServedRounds:
    """Plays rounds as `player` does, with the endpoint up from the first one on."""

    def __init__(self, player: RoundPlayer, endpoint: Endpoint) -> None:
        self.player, self.endpoint = player, endpoint

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.player.metrics

    async def groups(self, this_round: Round, on_episode: OnEpisode | None = None) -> AsyncGenerator[Group]:
        await self.endpoint.start()
        async with aclosing(self.player.groups(this_round, on_episode)) as groups:
            async for group in groups:
                yield group

    async def collect(self, this_round: Round, on_episode: OnEpisode | None = None) -> list[Group]:
        await self.endpoint.start()
        return await self.player.collect(this_round, on_episode)

    def close(self) -> None:
        self.endpoint.close()
        self.player.close()
