"""One episode to be played: its prompt, seeds and sampling; and the limits of all episodes."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.engine.base import SamplingParams
from skyrl_train.types import Prompt


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """The limits at which an episode stops, whatever the policy and the environment do."""

    max_turns: int | None  # None: the environment's `done` decides, unless the row has a max_turns
    max_input_length: int  # tokens; a turn is not started on a longer input
    max_context: int  # tokens the model can read, reply included
    step_timeout_s: float  # for one call of the environment
    episode_timeout_s: float  # for all calls of one episode together


@dataclass(frozen=True, slots=True)
class EpisodeTask:
    """One episode to be played: its prompt, its number in the group, its seeds and its sampling."""

    prompt: Prompt
    repetition: int
    env_seed: int
    sampling: SamplingParams
    sampling_seed: int
    round_name: str  # part of the session id: the same prompt may be played in two rounds at once

    @property
    def id(self) -> str:
        """Return SkyRL's TrajectoryID as a string."""
        return f"{self.prompt.uid}_{self.repetition}"
