"""The in-process engine: asyncio in front, steps of the scheduler in the compute thread behind.

Requests of one tick of the event loop are handed over together, so a group that is submitted at once shares one
prefill from its first step on. Where they ask for it, such a tick is a round: see `TorchEngine`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from skyrl_train import compute
from skyrl_train.engine.base import Completion, EngineDied, Request, refuse_impossible_prompt
from skyrl_train.engine.torch.scheduler import EngineStats, Scheduler, Sequence
from skyrl_train.policy.model import Policy

SESSION_CACHE_BYTES = 1 << 30
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Caller:
    """A caller in an event loop who waits for the compute thread."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future


@dataclass(slots=True, eq=False)
class Pending(Caller):
    """A request and the caller who waits for it."""

    request: Request
    cancelled: bool = False
    sequence: Sequence | None = None  # once the scheduler has it


@dataclass(slots=True, eq=False)
class Pause(Caller):
    pass


@dataclass(slots=True, eq=False)
class Resume(Caller):
    pass


@dataclass(slots=True, eq=False)
class NewWeights(Caller):
    policy_version: int


@dataclass(frozen=True, slots=True)
class Forget:
    session_id: str


Order = Pause | Resume | NewWeights | Forget  # obeyed between two steps, also while requests must wait


class TorchEngine:
    """Samples from the learner's own module. On a CPU the decoder keeps a second, packed copy of its weights.

    That copy is rewritten at every `weights_changed`; all other weights are the learner's own tensors.

    The same seed, prompt and weights give the same tokens whatever else is in flight, up to the rounding of matmuls of
    different shapes. Requests with `in_round` are free of even that: those of one tick of the event loop (that is: all
    `generate` calls that were ready to run together, as under one `asyncio.gather`) form a round. Rounds are computed
    one after the other with nothing beside them, each sorted by (session_id, seed), and the completions of a round are
    delivered together when the last one is there. So a caller who submits a round at once and waits for all of it, and
    then the next, gets the same bits each time on the same machine.

    `deterministic`: every request is in a round, and no keys and values are kept between rounds, so that a round's
    numbers are a function of its requests and the weights, whatever was played before.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        deterministic: bool = False,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        session_cache_bytes: int = SESSION_CACHE_BYTES,
    ) -> None:
        """max_model_len: prompt and response together, at most (and by default) the model's context.
        kv_cache_bytes: for sequences in flight; others wait. Default: a quarter of the device's memory, at most half of
        what is free on a GPU.
        session_cache_bytes: for keys and values kept between turns; where both lie in pages, the two are one.
        """
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(f"{max_num_seqs=} and {max_num_batched_tokens=} must be at least 1")
        self.max_model_len = min(max_model_len or policy.context, policy.context)
        self._vocab_size = int(policy.config.vocab_size)
        self._deterministic = deterministic
        self._scheduler = Scheduler(
            policy,
            tokenizer,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            kv_cache_bytes=kv_cache_bytes or _cache_bytes(policy.device),
            session_cache_bytes=0 if deterministic else session_cache_bytes,
            cuda_graphs=not deterministic,  # a replayed step's last bits depend on how far the cache has grown
        )
        self._tick: list[Pending] = []  # generate() calls of this tick of the event loop
        self._requests: deque[list[Pending]] = deque()  # those of one tick and kind, not begun yet
        self._orders: deque[Order] = deque()
        self._lock = threading.Lock()
        self._stopped: str | None = None  # why
        self._cause: BaseException | None = None  # if an error stopped it
        self._under_way = False  # a turn is submitted or running
        self._is_paused = False  # the compute thread's own, like what follows
        self._is_round = False  # what is in flight
        self._in_flight: dict[Sequence, Pending] = {}
        self._finished: list[tuple[Caller, Completion]] = []  # not delivered yet

    @property
    def busy_seconds(self) -> float:
        return self._scheduler.stats.busy_seconds

    def stats(self) -> EngineStats:
        return self._scheduler.stats

    async def generate(self, request: Request) -> Completion:
        self._refuse_impossible(request)
        if self._deterministic:
            request = replace(request, in_round=True)
        loop = asyncio.get_running_loop()
        pending = Pending(loop, loop.create_future(), request)
        self._tick.append(pending)
        loop.call_soon(self._hand_over)  # runs after every task that is ready now has come this far
        try:
            return await pending.future
        finally:
            pending.cancelled = pending.future.cancelled()

    async def pause(self) -> None:
        """Return once the step under way has ended. Sequences in flight keep their tokens, keys and values."""
        await self._obeyed(Pause(*_waiter()))

    async def weights_changed(self, policy_version: int) -> None:
        """Return once no later step can use what was computed with the old weights."""
        self._hand_over()
        await self._obeyed(NewWeights(*_waiter(), policy_version))

    async def resume(self) -> None:
        await self._obeyed(Resume(*_waiter()))

    async def forget(self, session_id: str) -> None:
        self._send(self._orders, Forget(session_id))

    async def close(self) -> None:
        """Stop after the step under way. Requests in flight fail with `EngineDied`."""
        self._stop("the engine was closed before this request was finished")
        await asyncio.wrap_future(compute.submit(self._end, None))  # after the last turn

    def _refuse_impossible(self, request: Request) -> None:
        if self._stopped is not None:
            raise self._refusal()
        refuse_impossible_prompt(request, self.max_model_len, self._vocab_size)
        room, most = self._scheduler.room_for(request), self._scheduler.max_cached_tokens
        if room > most:
            raise ValueError(
                f"session {request.session_id}: prompt and response need a cache of {room} tokens, but there is memory "
                f"for {most} (kv_cache_bytes); ask for fewer max_tokens or a shorter prompt"
            )

    def _hand_over(self) -> None:
        tick, self._tick = self._tick, []
        for in_round in (False, True):
            requests = [pending for pending in tick if pending.request.in_round == in_round]
            if requests and not self._send(self._requests, requests):
                self._fail(requests)

    async def _obeyed(self, order: Pause | Resume | NewWeights) -> None:
        if not self._send(self._orders, order):
            raise self._refusal()
        await order.future

    def _send(self, queue: deque[T], item: T) -> bool:
        """Put an item into one of the queues. False: the engine has stopped, and nothing will take it out."""
        with self._lock:
            if self._stopped is None:
                queue.append(item)
                self._submit_turn()
            return self._stopped is None

    def _submit_turn(self) -> None:
        if not self._under_way:
            compute.submit(self._turn)
            self._under_way = True

    def _stop(self, why: str) -> None:
        with self._lock:
            self._stopped = self._stopped or why

    def _fail(self, waiters: Iterable[Caller]) -> None:
        _settle([(waiter, self._refusal()) for waiter in waiters])

    def _refusal(self) -> EngineDied:
        refusal = EngineDied(self._stopped)
        refusal.__cause__ = self._cause
        return refusal

    # Below: in the compute thread.

    def _turn(self) -> None:
        """Obey what was sent, do one step, and submit the next turn, so that a learner in between gets its own."""
        try:
            self._drop_cancelled()
            self._obey_orders()
            self._begin_requests()
            if self._can_step():
                for sequence, completion in self._scheduler.step():
                    self._finished.append((self._in_flight.pop(sequence), completion))
                _tell_of_progress(self._in_flight.items())
            if not self._is_round or self._scheduler.is_idle:
                _settle(self._finished)
                self._finished = []
            with self._lock:
                self._under_way = False
                if self._orders or self._can_step() or self._can_begin():
                    self._submit_turn()
        finally:
            if self._stopped is not None or sys.exception() is not None:
                self._end(sys.exception())

    def _can_step(self) -> bool:
        return self._stopped is None and not self._is_paused and not self._scheduler.is_idle

    def _can_begin(self) -> bool:
        """Return whether the next requests may begin: a round is computed apart from what comes before and after."""
        if self._stopped is not None or not self._requests:
            return False
        is_apart = self._is_round or self._requests[0][0].request.in_round
        return not (is_apart and (self._in_flight or self._finished))

    def _obey_orders(self) -> None:
        while self._orders:
            self._obey(self._orders[0])
            self._orders.popleft()  # only now: an order that fails leaves its waiter where _end finds it

    def _obey(self, order: Order) -> None:
        match order:
            case Forget(session_id):
                self._scheduler.forget(session_id)
                return
            case NewWeights():
                self._scheduler.weights_changed(order.policy_version)
            case Pause():
                self._is_paused = True
            case Resume():
                self._is_paused = False
        _settle([(order, None)])

    def _begin_requests(self) -> None:
        while self._can_begin():
            self._begin(self._requests[0])
            self._requests.popleft()

    def _begin(self, requests: list[Pending]) -> None:
        self._is_round = requests[0].request.in_round
        if self._is_round:
            requests = sorted(requests, key=lambda p: (p.request.session_id, p.request.sampling.seed))
        for pending in requests:
            pending.sequence = self._scheduler.add(pending.request)
            self._in_flight[pending.sequence] = pending

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence, pending in self._in_flight.items() if pending.cancelled]:
            self._scheduler.abort(sequence)
            del self._in_flight[sequence]

    def _end(self, error: BaseException | None) -> None:
        """Stop for good, and tell everyone who waits why there will be no answer."""
        self._cause = self._cause or error
        self._stop(f"the engine died of {_what_and_where(error)}")
        waiters: list[Caller] = [*self._in_flight.values(), *(waiter for waiter, _ in self._finished)]
        waiters += [pending for requests in self._requests for pending in requests]
        waiters += [order for order in self._orders if isinstance(order, Caller)]
        self._in_flight, self._finished = {}, []
        self._requests.clear()
        self._orders.clear()
        self._fail(waiters)


def _waiter() -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]:
    loop = asyncio.get_running_loop()
    return loop, loop.create_future()


def _what_and_where(error: BaseException | None) -> str:
    """Return the error and the line that raised it: a run that this ends shows no traceback."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _cache_bytes(device: torch.device) -> int:
    """Return a quarter of the memory of a device, for a CPU of the machine's; at most half of what a GPU has free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(total // 4, free // 2)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _tell_of_progress(in_flight: Iterable[tuple[Sequence, Pending]]) -> None:
    for sequence, pending in in_flight:
        on_progress = pending.request.on_progress
        if on_progress is not None and sequence.logprobs and not pending.loop.is_closed():
            pending.loop.call_soon_threadsafe(on_progress, sequence.response_ids, list(sequence.logprobs))


def _settle(outcomes: Collection[tuple[Caller, object]]) -> None:
    """Wake the waiters, all of one event loop in one of its ticks. An exception as outcome is raised there."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Caller, object]]] = {}
    for waiter, outcome in outcomes:
        by_loop.setdefault(waiter.loop, []).append((waiter, outcome))
    for loop, mine in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_outcomes, mine)


def _set_outcomes(outcomes: list[tuple[Caller, object]]) -> None:
    for waiter, outcome in outcomes:
        if waiter.future.done():
            continue  # cancelled meanwhile
        if isinstance(outcome, BaseException):
            waiter.future.set_exception(outcome)
        else:
            waiter.future.set_result(outcome)
