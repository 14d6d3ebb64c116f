"""A round of episodes: what is asked for, and who plays it, as a protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from skyrl_train.engine.base import SamplingParams
from skyrl_train.types import Group, Prompt, Trajectory

OnEpisode = Callable[[Trajectory], None]


@dataclass(frozen=True, slots=True)
class Round:
    """A round of episodes: some prompts, and how many episodes of each."""

    phase: str  # "train" or "eval"; part of every seed
    step: int
    prompts: list[Prompt]
    samples_per_prompt: int
    sampling: SamplingParams
    reproducible: bool = False  # episodes take their turns together, so that the engine computes the same each time

    @property
    def name(self) -> str:
        """`train_3`: part of every session id, so that rounds which are under way together do not mix."""
        return f"{self.phase}_{self.step}"

    @property
    def num_episodes(self) -> int:
        return len(self.prompts) * self.samples_per_prompt


class EveryEpisodeFailed(RuntimeError):
    """No episode of a round survived its retries: something is wrong with the environment itself."""


class RoundPlayer(Protocol):
    """Anything that plays rounds: our collector, or a generator of the user's behind the same interface.

    Both calls raise EveryEpisodeFailed after a round without a single episode, and EngineDied as it is.
    """

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics that the player itself measured in its last training round."""
        ...

    def groups(self, this_round: Round, on_episode: OnEpisode | None = None) -> AsyncGenerator[Group]:
        """Yield each group when its last episode has ended. Close the iterator (contextlib.aclosing) to stop early."""
        ...

    async def collect(self, this_round: Round, on_episode: OnEpisode | None = None) -> list[Group]:
        """Return all groups in the order of the prompts. Failed episodes are in them, typed ENV_FAILURE."""
        ...

    def close(self) -> None:
        """Free threads and other means of playing."""
        ...
