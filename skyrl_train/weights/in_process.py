"""Weights for a learner and an engine in one process: both hold the same tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from skyrl_train.weights.base import PushFailed

if TYPE_CHECKING:
    from skyrl_train.engine.base import Engine
    from skyrl_train.learner.base import Learner  # both import from this room


class InProcessWeights:
    """Tells the engine that the weights it shares with the learner have changed.

    No weight travels. What the engine derived from the old ones goes: it drops its cached keys and values, and on a CPU
    its decoder rewrites the packed copy that it keeps of the linear layers.

    An update writes into the very tensors that the engine computes with. Whoever trains while requests are in flight
    pauses the engine before the update; the push resumes it.
    """

    metrics: ClassVar[dict[str, float]] = {}  # nothing travels

    async def before_update(self, engine: Engine) -> None:
        """Do nothing: the memory plan has room for both."""

    async def push(self, learner: Learner, engine: Engine) -> None:
        """Pause the engine, tell it, and resume it. PushFailed if it breaks in between; then it stays paused."""
        version = learner.policy_version
        try:
            await engine.pause()
            await engine.weights_changed(version)
            await engine.resume()
        except (RuntimeError, OSError) as error:
            raise PushFailed(
                f"the weights of policy version {version} did not reach the engine, which samples nothing more: {error}"
            ) from error
