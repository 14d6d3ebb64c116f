"""The retries of an episode whose environment failed: how many there are, and the pause before each."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_gym.core import EnvFailure, EnvLost

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # each pause is twice the one before
# Lost servers and sessions of an environment. A loss in the episode's own step counts twice: the step may be the cause.
LOSSES_ALLOWED = 8


@dataclass
class Attempts:
    """The attempts at one episode: the first one, and the retries that its failures still allow."""

    max_retries: int  # after failures that are not losses
    num: int = 1
    num_failures: int = 0
    num_losses: int = 0

    def pause_s(self, failure: EnvFailure) -> float | None:
        """Count a failed attempt. Return the seconds to wait before the next one; None if there is none."""
        if isinstance(failure, EnvLost):
            self.num_losses += 2 if failure.in_step else 1
        else:
            self.num_failures += 1
        if self.num_failures > self.max_retries or self.num_losses > max(LOSSES_ALLOWED, self.max_retries):
            return None
        self.num += 1
        return min(FIRST_PAUSE_S * 2 ** (self.num_failures + self.num_losses - 1), LONGEST_PAUSE_S)
