"""The contract every environment keeps: init, step, close, and what it raises when it breaks."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

if TYPE_CHECKING:
    from typing import Self

    from skyrl_gym.envs.registration import EnvSpec

ObsType = TypeVar("ObsType")
ActType = TypeVar("ActType")


class EnvFailure(Exception):
    """The environment itself broke: a dead server, a time-out, a missing database.

    Raised by `init` and `step`, never for something the policy wrote. It is nobody's reward: the rollout plays the
    episode again on a fresh environment with the same seed, and counts it. Any other exception and an answer of the
    wrong form (skyrl_gym/contract.py) count as the same; but a mistake in the code, such as a KeyError, is not retried.
    """


class EnvLost(EnvFailure):
    """What the environment runs on was lost, such as its server. The rollout waits a moment and plays again, more often
    than after other failures: a server may take a while to come back.

    in_step: it happened during this episode's own step, which may have been the cause.
    """

    def __init__(self, message: str, *, in_step: bool) -> None:
        super().__init__(message)
        self.in_step = in_step


class EnvStepOutput(TypedDict):
    """What one step gives back."""

    observations: Any
    reward: float
    done: bool
    metadata: dict[str, Any]


class Env(Generic[ObsType, ActType]):
    """One episode of one task. `make` sets `spec`."""

    spec: EnvSpec | None = None

    def init(self, *kwargs: Any) -> tuple[ObsType, dict[str, Any]]:
        """Start the episode: the first observation and a dict of facts about it."""
        raise NotImplementedError(f"{type(self).__name__} must define init")

    def step(self, action: ActType) -> EnvStepOutput:
        """Answer one action."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def close(self) -> None:
        """Give everything back. Always called, perhaps twice, perhaps before `init`."""

    def __str__(self) -> str:
        return f"Env({type(self).__name__})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
