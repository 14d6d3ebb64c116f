"""The way of new weights from the learner to an engine, as a protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from skyrl_train.engine.base import Engine
    from skyrl_train.learner.base import Learner  # both import from this room


class PushFailed(RuntimeError):
    """The engine did not take the new weights. It is paused or dead, so it samples nothing from half of them."""


class Weights(Protocol):
    """The way from a learner to an engine."""

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the last push, `weights/...`. Empty where nothing travels."""
        ...

    async def before_update(self, engine: Engine) -> None:
        """Give the learner the memory of an engine that shares its device. The engine is paused until the next push."""
        ...

    async def push(self, learner: Learner, engine: Engine) -> None:
        """Let the engine sample from the learner's weights as they are now.

        The engine is paused meanwhile: requests wait, and none is lost. If a step of the push fails, PushFailed is
        raised and the engine is not resumed; a later push that succeeds lets it go on.
        """
        ...
