"""One place in a pool of engines: its engine, the requests under way there, and the signs that it is alive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from skyrl_train.engine.base import Completion, EngineDied, LoadingEngine, Request

if TYPE_CHECKING:
    from skyrl_train.weights.sent import SentWeights
    from skyrl_train.weights.shared_memory import OpenWeights

T = TypeVar("T")
AGREE = 0.1  # nats: logprobs of one token by two engines with the same weights, whatever their type of number


class WeightsGone(RuntimeError):
    """The learner holds newer weights than those that a new engine is to load. The push that brings them is near."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """The state that every engine of a pool is brought to. None: as the engine was started.

    proof: token ids and the logprobs that engines with these weights give them.
    """

    weights: OpenWeights | SentWeights | None = None
    proof: tuple[list[int], list[float]] | None = None
    policy_version: int | None = None
    is_paused: bool = False
    is_asleep: bool = False

    async def apply_to(self, engine: LoadingEngine, loaded: OpenWeights | SentWeights | None) -> None:
        """Bring a new engine, which holds `loaded`, to this state. It is paused until it has the weights.

        WeightsGone if nobody holds them any more.
        """
        await engine.pause()
        if self.weights is not None and self.weights is not loaded:
            shared = await self.weights.at_hand()
            if shared is None:
                raise WeightsGone(f"version {self.weights.version}")
            await engine.load_weights(shared)
        if self.weights is not None and self.proof is not None:
            ids, logprobs = self.proof
            refuse_unequal([logprobs, await engine.logprobs_of_tokens(ids)])
        if self.policy_version is not None:
            await engine.weights_changed(self.policy_version)
        if self.is_asleep:
            await engine.sleep()
        elif not self.is_paused:
            await engine.resume()


class Member:
    """A place of the pool. `engine` is the one that is there, or the lost one until another takes its place."""

    def __init__(self, index: int, engine: LoadingEngine) -> None:
        self.index = index
        self.engine = engine
        self.is_up = True
        self.num_sessions = 0
        self.num_replacements = 0  # since an engine in this place last completed a request
        self.replacement: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Future[Completion]] = set()
        self._busy_before = 0.0  # seconds that earlier engines in this place computed for
        self._num_completed = 0
        self.take_in(engine)

    @property
    def busy_seconds(self) -> float:
        return self._busy_before + self.engine.busy_seconds

    def take_in(self, engine: LoadingEngine) -> None:
        """Put an engine in this place and let requests go to it."""
        if engine is not self.engine:
            self._busy_before += self.engine.busy_seconds
        self.engine = engine
        self._signs: tuple[float, int] | None = None
        self._last_sign = 0.0
        self.is_up = True

    def abandon(self) -> None:
        """Send no more requests to the engine, and take back those that it has: `ask` raises EngineDied for each."""
        self.is_up = False
        for request in self._requests:
            request.cancel()

    async def ask(self, request: Request) -> Completion:
        """Return the engine's completion. EngineDied if the engine died, or was abandoned meanwhile."""
        reply = asyncio.ensure_future(self.engine.generate(request))
        self._requests.add(reply)
        engine = self.engine
        try:
            completion = await reply
        except asyncio.CancelledError:
            asking = asyncio.current_task()
            if asking is None or asking.cancelling():
                raise
            raise EngineDied(f"engine {self.index} was given up while it had a request") from None
        finally:
            self._requests.discard(reply)
        self._num_completed += 1
        if self.engine is engine:
            self.num_replacements = 0
        return completion

    def silent_for(self, now: float, *, is_paused: bool) -> float:
        """Return the seconds since the engine computed, completed a request, was idle or was paused.

        Looks at the engine when it is called, and so has to be called again and again.
        """
        signs = self.engine.busy_seconds, self._num_completed
        if signs != self._signs or is_paused or not self._requests:
            self._signs, self._last_sign = signs, now
        return now - self._last_sign


def refuse_unequal(found: Sequence[list[float]]) -> None:
    """Raise RuntimeError if the logprobs that engines give the same tokens differ by more than rounding."""
    apart = max((max(place) - min(place) for place in zip(*found, strict=True)), default=0.0)
    if not apart <= AGREE:
        raise RuntimeError(f"engines differ by {apart:.3g} nats in one token's logprob: their weights are not equal")


async def outcome_of(call: Awaitable[T], timeout_s: float) -> T | BaseException:
    """Return the result of a call, or the error that it raised. TimeoutError if it takes longer than the deadline."""
    [outcome] = await asyncio.gather(asyncio.wait_for(call, timeout_s), return_exceptions=True)
    return outcome


async def outcomes_of(calls: Sequence[Awaitable[T]], timeout_s: float) -> list[T | BaseException]:
    """Return `outcome_of` each call; all are awaited at once."""
    return await asyncio.gather(*(outcome_of(call, timeout_s) for call in calls))


StartEngine = Callable[[int], Awaitable[LoadingEngine]]  # index of the place -> a new engine, with whatever weights
