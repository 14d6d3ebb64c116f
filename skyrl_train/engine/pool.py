"""Several engines as one: a session stays with its engine, and an engine that dies or falls silent is replaced.

A new engine gets the weights that the others have before it gets a request. Requests that the lost one had are sent
again as they were: a seed, a prompt and the weights decide a reply, whichever engine computes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from zlib import crc32

from loguru import logger

from skyrl_train.engine.base import Completion, EngineDied, LoadingEngine, Request
from skyrl_train.engine.member import (
    EngineState,
    Member,
    StartEngine,
    WeightsGone,
    outcome_of,
    outcomes_of,
    refuse_unequal,
)
from skyrl_train.weights.shared_memory import OpenWeights, SharedWeights

if TYPE_CHECKING:
    from skyrl_train.weights.sent import SentWeights

T = TypeVar("T")
SILENT_S = 300.0  # an engine that has requests and shows no sign of computing for so long is replaced
CALL_S = 8.0  # for a call that computes next to nothing: then the engine is replaced, and the push goes on
BYTES_PER_S = 150e6  # of a slow machine: loading may take longer by the size of the weights
CLOSE_S = 60.0
START_S = 900.0  # for starting an engine and loading the weights into it
FIRST_PAUSE_S = 0.5  # before a replacement that follows one which completed no request; doubled each time
MAX_REPLACEMENTS = 3  # in one place, one after the other, without a completed request
LOOKS = 8  # how often the pool looks at each engine within `silent_s`


class EnginePool:
    """A LoadingEngine made of several. Raises EngineDied when replacing an engine does not help.

    A new session goes to the engine with the fewest sessions. Requests with `in_round` go where their session's name
    says, also after a death, so that an engine gets the same rounds each time. Then a reply is the same up to the bit.
    """

    def __init__(
        self,
        engines: Sequence[LoadingEngine],
        start: StartEngine,
        *,
        silent_s: float = SILENT_S,
        call_s: float = CALL_S,
        max_replacements: int = MAX_REPLACEMENTS,
    ) -> None:
        """start: makes the engine for a place, from 0. It has to have a deadline for what it waits for."""
        if not engines:
            raise ValueError("a pool needs at least one engine")
        self._members = [Member(index, engine) for index, engine in enumerate(engines)]
        self._start = start
        self._silent_s, self._call_s, self._max_replacements = silent_s, call_s, max_replacements
        self._wanted = EngineState()
        self._of_session: dict[str, Member] = {}
        self._changed = asyncio.Event()  # set once: when an engine comes up, or the pool stops
        self._watch: asyncio.Task[None] | None = None
        self._stopped: str | None = None  # why
        self._not_loaded: str | None = None  # why no engine has whole weights

    @property
    def max_model_len(self) -> int:
        """Return what every engine can read."""
        return min(member.engine.max_model_len for member in self._members)

    @property
    def busy_seconds(self) -> float:
        """Return the mean over the engines, so that its share of the time that has passed is at most 1."""
        return sum(member.busy_seconds for member in self._members) / len(self._members)

    async def generate(self, request: Request) -> Completion:
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_for_silence())
        deaths: list[str] = []
        while len(deaths) <= self._max_replacements:
            member = await self._member_for(request)
            engine = member.engine
            try:
                return await member.ask(request)
            except EngineDied as death:
                deaths.append(str(death))
                self._lose(member, engine, str(death))
        self._stop(f"{len(deaths)} engines died or fell silent while they had one request; the last one: {deaths[-1]}")
        raise EngineDied(self._stopped)

    @property
    def num_up(self) -> int:
        """Return how many engines there are now; those that are being replaced do not count."""
        return len(self._up())

    async def pause(self) -> None:
        self._wanted = replace(self._wanted, is_paused=True)
        await self._call_all(lambda engine: engine.pause())

    async def sleep(self) -> None:
        """Let all engines give their memory back. One that is lost is replaced when the next weights come: not before,
        since the memory that it would need is the learner's."""
        self._wanted = replace(self._wanted, is_paused=True, is_asleep=True)
        await self._call_all(lambda engine: engine.sleep())

    async def load_weights(self, weights: SharedWeights | SentWeights) -> None:
        """Load them into every engine that is up; one that is being replaced gets them before its first request.

        An engine that does not take them is replaced. If none takes them, the first one's error is raised.
        """
        self._refuse_if_stopped()
        self._wanted = replace(self._wanted, is_asleep=False)
        self._tell_of_change()
        is_file = isinstance(weights, SharedWeights)
        kept, travels = (OpenWeights(weights), weights) if is_file else (weights, weights.broadcast)
        before, self._wanted = self._wanted, replace(self._wanted, weights=kept, proof=None)
        timeout_s = self._call_s + weights.num_bytes / BYTES_PER_S
        members, outcomes = await self._outcomes(lambda engine: engine.load_weights(travels), timeout_s)
        errors = [outcome for _, outcome in outcomes if isinstance(outcome, BaseException)]
        refusals = [error for error in errors if not _is_loss(error)]
        if refusals and len(errors) == len(members):
            self._wanted, self._not_loaded = before, f"the last weights were not loaded: {refusals[0]}"
        else:
            self._not_loaded = None
        for member, (engine, outcome) in zip(members, outcomes, strict=True):
            if isinstance(outcome, BaseException) and (_is_loss(outcome) or self._not_loaded is None):
                self._lose(member, engine, f"it did not take new weights: {_words(outcome)}")
        self._refuse_if_stopped()
        if self._not_loaded is not None:
            raise refusals[0]

    async def weights_changed(self, policy_version: int) -> None:
        self._wanted = replace(self._wanted, policy_version=policy_version)
        await self._call_all(lambda engine: engine.weights_changed(policy_version))

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        """Return what the engines agree on. RuntimeError if two of them differ by more than rounding."""
        while not (found := await self._call_all(lambda engine: engine.logprobs_of_tokens(ids))):
            while not self._up():
                await self._changed.wait()
                self._refuse_if_stopped()
        refuse_unequal(found)
        self._wanted = replace(self._wanted, proof=(ids, found[0]))
        return found[0]

    async def resume(self) -> None:
        self._wanted = replace(self._wanted, is_paused=False)
        await self._call_all(lambda engine: engine.resume())

    async def forget(self, session_id: str) -> None:
        member = self._of_session.pop(session_id, None)
        if member is None:
            return
        member.num_sessions -= 1
        if member.is_up:
            engine = member.engine
            outcome = await outcome_of(engine.forget(session_id), self._call_s)
            if isinstance(outcome, BaseException):
                self._lose(member, engine, _words(outcome))

    async def close(self) -> None:
        """Close every engine, those that are being started too."""
        self._stop("the engine was closed before this request was finished")
        replacements = [member.replacement for member in self._members if member.replacement is not None]
        for replacement in replacements:
            replacement.cancel()
        await asyncio.gather(*replacements, return_exceptions=True)
        for outcome in await outcomes_of([member.engine.close() for member in self._members], CLOSE_S):
            if isinstance(outcome, BaseException):
                logger.warning(f"an engine was not closed: {_words(outcome)}")

    async def _member_for(self, request: Request) -> Member:
        """Return where the session is; else give it a place, as soon as there is one."""
        while True:
            self._refuse_if_stopped()
            if self._not_loaded is not None:
                raise RuntimeError(self._not_loaded)
            member = self._of_session.get(request.session_id) or self._place_for(request)
            if member is not None and member.is_up:
                if request.session_id not in self._of_session:
                    self._of_session[request.session_id] = member
                    member.num_sessions += 1
                return member
            await self._changed.wait()

    def _place_for(self, request: Request) -> Member | None:
        """Return the place for a new session, which may be empty just now; None if every place is."""
        if request.in_round:
            return self._members[crc32(request.session_id.encode()) % len(self._members)]
        return min(self._up(), key=lambda member: member.num_sessions, default=None)

    def _up(self) -> list[Member]:
        return [member for member in self._members if member.is_up]

    async def _outcomes(
        self, call: Callable[[LoadingEngine], Awaitable[T]], timeout_s: float
    ) -> tuple[list[Member], list[tuple[LoadingEngine, T | BaseException]]]:
        """Make a call of every engine that is up. Return their members, and each engine with its result or error."""
        members = self._up()
        engines = [member.engine for member in members]
        outcomes = await outcomes_of([call(engine) for engine in engines], timeout_s)
        return members, list(zip(engines, outcomes, strict=True))

    async def _call_all(self, call: Callable[[LoadingEngine], Awaitable[T]]) -> list[T]:
        """Make a call of every engine that is up and return the results. One that does not answer is replaced."""
        self._refuse_if_stopped()
        members, outcomes = await self._outcomes(call, self._call_s)
        results: list[T] = []
        for member, (engine, outcome) in zip(members, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                results.append(outcome)
            elif _is_loss(outcome):
                self._lose(member, engine, _words(outcome))
            elif member.engine is engine and member.is_up:
                raise outcome
        self._refuse_if_stopped()
        return results

    def _lose(self, member: Member, engine: LoadingEngine, why: str) -> None:
        """Replace an engine, unless that has begun."""
        if self._stopped is not None or member.engine is not engine or not member.is_up:
            return
        member.abandon()
        for session_id in [session_id for session_id, its in self._of_session.items() if its is member]:
            del self._of_session[session_id]
        member.num_sessions = 0
        member.replacement = asyncio.create_task(self._replace(member, why))

    async def _replace(self, member: Member, why: str) -> None:
        """Start an engine in the place of a lost one, again if that fails. Stops the pool where it does not help."""
        await outcome_of(member.engine.close(), CLOSE_S)  # it holds memory that the next one needs
        while self._wanted.is_asleep and self._stopped is None:
            await self._changed.wait()
        while member.num_replacements < self._max_replacements:
            logger.warning(f"engine {member.index} is replaced: {why}")
            if member.num_replacements:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (member.num_replacements - 1))
            member.num_replacements += 1
            outcome = await outcome_of(self._bring_up(member), START_S)
            if not isinstance(outcome, BaseException):
                return
            why = f"it did not start: {_words(outcome)}"
        self._stop(
            f"engine {member.index} was replaced {member.num_replacements} times without completing a request; {why}"
        )

    async def _bring_up(self, member: Member) -> None:
        """Start an engine, and let requests go to it in the very moment in which its state is what is wanted."""
        engine = await self._start(member.index)
        reached = EngineState()
        try:
            while True:
                wanted = self._wanted
                try:
                    await wanted.apply_to(engine, reached.weights)
                except WeightsGone:
                    await self._next_weights(wanted)
                    continue
                if wanted == self._wanted:
                    break
                reached = wanted
        except BaseException:
            await outcome_of(engine.close(), CLOSE_S)
            raise
        member.take_in(engine)
        self._tell_of_change()

    async def _next_weights(self, wanted: EngineState) -> None:
        while self._wanted.weights is wanted.weights and self._stopped is None:
            await self._changed.wait()
        self._refuse_if_stopped()

    async def _watch_for_silence(self) -> None:
        while True:
            await asyncio.sleep(self._silent_s / LOOKS)
            now = asyncio.get_running_loop().time()
            for member in self._members:
                silent_s = member.silent_for(now, is_paused=self._wanted.is_paused)
                if member.is_up and silent_s >= self._silent_s:
                    self._lose(member, member.engine, f"it has requests and computed nothing for {silent_s:.0f} s")

    def _stop(self, why: str) -> None:
        """Refuse every request from now on, and those under way."""
        self._stopped = self._stopped or why
        if self._watch is not None:
            self._watch.cancel()
        for member in self._members:
            member.abandon()
        self._tell_of_change()

    def _tell_of_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _refuse_if_stopped(self) -> None:
        if self._stopped is not None:
            raise EngineDied(self._stopped)


def _is_loss(outcome: BaseException) -> bool:
    """Return whether the error says that the engine is gone, and not that it refuses what it was asked."""
    return isinstance(outcome, EngineDied | TimeoutError)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
