"""The retries of an episode whose environment failed: how many there are, and the pause before each."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from skyrl_gym.core import EnvFailure, EnvGivenUp, EnvLost

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # each is twice the one before, less up to half of it by chance
# Lost servers and sessions of an environment. A loss in the episode's own step counts twice: the step may be the cause.
LOSSES_ALLOWED = 8


@dataclass
class Attempts:
    """The attempts at one episode: the first one, and the retries that its failures still allow.

    Episodes that lost the same server come back at different times, by chance: one of them may end the next server too.
    """

    max_retries: int  # after failures that are not losses
    chance: Random
    num: int = 1
    num_failures: int = 0
    num_losses: int = 0

    def pause_s(self, failure: EnvFailure) -> float | None:
        """Count a failed attempt. Return the seconds to wait before the next one; None if there is none."""
        if isinstance(failure, EnvGivenUp):
            return None
        if isinstance(failure, EnvLost):
            self.num_losses += 2 if failure.in_step else 1
        else:
            self.num_failures += 1
        if self.num_failures > self.max_retries or self.num_losses > max(LOSSES_ALLOWED, self.max_retries):
            return None
        self.num += 1
        longest_s = min(FIRST_PAUSE_S * 2 ** (self.num_failures + self.num_losses - 1), LONGEST_PAUSE_S)
        return longest_s * self.chance.uniform(0.5, 1.0)
