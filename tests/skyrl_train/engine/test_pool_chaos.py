"""The pool among engines that die, fall silent and start late at random moments, in simulated time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.engine.base import Completion, EngineDied, Request, SamplingParams
from skyrl_train.engine.pool import EnginePool
from skyrl_train.weights.shared_memory import SharedWeights, read_shared, write_shared
from tests.simulated_time import in_simulated_time

SILENT_S, CALL_S = 40.0, 5.0
Scenario = Callable[[EnginePool], Awaitable[None]]


@dataclass
class SlowEngine:
    """Replies after a while with its weights' number, the prompt and the seed. Dies or falls silent when told."""

    takes_s: float = 1.0
    start_weights: int = -1
    busy_seconds: float = 0.0
    max_model_len: int = 512
    dead: str | None = None
    silent: bool = False
    version: int = 0
    sessions: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = self.start_weights
        self.goes_on, self.ends = asyncio.Event(), asyncio.Event()
        self.goes_on.set()

    async def generate(self, request: Request) -> Completion:
        self.calls.append("generate")
        self.requests.append(request)
        await self._after(self.takes_s * (1 + request.sampling.seed % 3))
        await self._while_alive(self.goes_on.wait())
        self.busy_seconds += self.takes_s
        reply = [self.weights, *request.prompt_ids, request.sampling.seed]
        return Completion("", reply, [0.0] * len(reply), "stop", self.version)

    async def pause(self) -> None:
        await self._call("pause")
        self.goes_on.clear()

    async def load_weights(self, shared: Any) -> None:
        await self._call("load_weights")
        [(_, weights)] = read_shared(shared)
        await self._after(0.5)
        self.weights = int(weights)

    async def sleep(self) -> None:
        await self.pause()

    async def weights_changed(self, policy_version: int) -> None:
        await self._call("weights_changed")
        self.version = policy_version

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        await self._call("logprobs_of_tokens")
        return [float(self.weights)] * (len(ids) - 1)

    async def resume(self) -> None:
        await self._call("resume")
        self.goes_on.set()

    async def forget(self, session_id: str) -> None:
        pass

    async def close(self) -> None:
        self.die("closed")
        if self.silent:
            await asyncio.Event().wait()

    def die(self, why: str) -> None:
        self.dead = self.dead or why
        self.ends.set()

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        await self._after(0.1)

    async def _after(self, seconds: float) -> None:
        await self._while_alive(asyncio.sleep(seconds))
        if self.silent:
            await asyncio.Event().wait()

    async def _while_alive(self, wait) -> None:
        waits = [asyncio.ensure_future(wait), asyncio.ensure_future(self.ends.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        if self.dead is not None:
            raise EngineDied(self.dead)


def request(number: int, session: str | None = None) -> Request:
    return Request([number, 1], SamplingParams(max_tokens=8, seed=number), session or f"s{number}")


def shared(folder: Path, version: int) -> SharedWeights:
    return write_shared([("w", torch.tensor(version))], folder / f"v{version}", version)


async def push(pool: EnginePool, folder: Path, version: int) -> None:
    await pool.pause()
    file = shared(folder, version)
    await pool.load_weights(file)
    file.path.unlink()
    assert await pool.logprobs_of_tokens([1, 2]) == [version]
    await pool.weights_changed(version)
    await pool.resume()


EVENTS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["dies", "is silent", "push"]), st.integers(0, 2)), max_size=8
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, num_engines=st.integers(1, 3), num_requests=st.integers(1, 12), start_s=st.integers(0, 20))
def test_no_request_is_lost_and_no_reply_is_of_old_weights(
    tmp_path_factory, events, num_engines, num_requests, start_s
):
    folder = tmp_path_factory.mktemp("weights")

    async def run() -> None:
        alive = {index: SlowEngine() for index in range(num_engines)}
        made = list(alive.values())

        async def start(index: int) -> SlowEngine:
            await asyncio.sleep(start_s)
            made.append(SlowEngine())
            alive[index] = made[-1]
            return made[-1]

        pool = EnginePool(list(alive.values()), start, silent_s=SILENT_S, call_s=CALL_S, max_replacements=100)
        await push(pool, folder, 0)
        pushed = 0

        async def ask(number: int) -> None:
            await asyncio.sleep(number)
            for _ in range(2):  # two turns
                version_before = pushed
                reply = await pool.generate(request(number))
                assert reply.response_ids[1:] == [number, 1, number]
                # the version says what computed it, and is never older than what was there when it was asked for
                assert version_before <= reply.policy_version == reply.response_ids[0]
            await pool.forget(f"s{number}")

        asking = [asyncio.create_task(ask(number)) for number in range(num_requests)]
        for wait_s, event, index in events:
            await asyncio.sleep(wait_s / 4)
            engine = alive[index % num_engines]
            if event == "dies":
                engine.die("an error")
            elif event == "is silent":
                engine.silent = True
            else:
                await push(pool, folder, pushed + 1)
                pushed += 1
        await asyncio.gather(*asking)
        await push(pool, folder, 99)
        await asyncio.sleep(1000)
        assert (await pool.generate(request(1))).response_ids[0] == 99
        up = [engine for engine in alive.values() if engine.dead is None and not engine.silent]
        assert {(engine.weights, engine.version) for engine in up} <= {(99, 99)}
        for engine in made[num_engines:]:
            first = engine.calls.index("generate") if "generate" in engine.calls else len(engine.calls)
            assert first == len(engine.calls) or engine.calls.index("load_weights") < first
        await pool.close()
        assert all(engine.dead for engine in made)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    in_simulated_time(run())


def run_with(engines: list[SlowEngine], start: Callable[[int], SlowEngine], scenario: Scenario) -> None:
    """Play a scenario with a pool of these engines and close it."""

    async def start_one(index: int) -> SlowEngine:
        return start(index)

    async def run() -> None:
        pool = EnginePool(engines, start_one, silent_s=SILENT_S, call_s=CALL_S, max_replacements=3)
        try:
            await scenario(pool)
        finally:
            await pool.close()

    in_simulated_time(run())


def never(index: int) -> SlowEngine:
    raise AssertionError(f"engine {index} is replaced")


def test_sessions_are_spread_and_stay_until_they_are_forgotten():
    engines = [SlowEngine(), SlowEngine()]

    async def scenario(pool: EnginePool) -> None:
        await asyncio.gather(*(pool.generate(request(number)) for number in range(6)))
        for number in (0, 2):
            await pool.forget(f"s{number}")
        await asyncio.gather(*(pool.generate(request(number)) for number in (1, 3, 4, 5, 6, 7)))

    run_with(engines, never, scenario)
    first, second = ([sent.session_id for sent in engine.requests] for engine in engines)
    assert (first[:3], second[:3]) == (["s0", "s2", "s4"], ["s1", "s3", "s5"])
    assert sorted(first[3:]) == ["s4", "s6", "s7"]  # the two new ones go where two were forgotten
    assert sorted(second[3:]) == ["s1", "s3", "s5"]


def test_new_sessions_go_to_a_new_engine_until_it_has_as_many_and_moved_ones_stay():
    engines, new = [SlowEngine(), SlowEngine()], SlowEngine()

    async def scenario(pool: EnginePool) -> None:
        await asyncio.gather(*(pool.generate(request(number)) for number in range(6)))
        engines[0].die("an error")
        await pool.generate(request(0))
        await asyncio.sleep(1)
        await asyncio.gather(*(pool.generate(request(number)) for number in range(10, 14)))
        await pool.generate(request(0))

    run_with(engines, lambda index: new if index == 0 else never(index), scenario)
    assert sorted(sent.session_id for sent in new.requests) == ["s10", "s11", "s12", "s13"]
    assert [sent.session_id for sent in engines[1].requests][3:] == ["s0", "s0"]


def test_an_engine_that_starts_during_a_pause_waits_for_its_end():
    engine, new = SlowEngine(), SlowEngine()

    async def scenario(pool: EnginePool) -> None:
        waits = asyncio.create_task(pool.generate(request(0)))
        await asyncio.sleep(0)
        await pool.pause()
        engine.die("an error")
        await asyncio.sleep(500)
        assert new.calls.count("generate") == 1
        assert not waits.done()
        await pool.resume()
        assert (await waits).response_ids == [-1, 0, 1, 0]

    run_with([engine], lambda _: new, scenario)


def test_rounds_go_where_their_sessions_name_says_whatever_the_load():
    engines = [SlowEngine(), SlowEngine()]

    async def scenario(pool: EnginePool) -> None:
        in_round = [replace(request(number), in_round=True) for number in range(8)]
        await asyncio.gather(*map(pool.generate, in_round))
        placed = [sorted(sent.session_id for sent in engine.requests) for engine in engines]
        for sent in in_round:
            await pool.forget(sent.session_id)
        await asyncio.gather(
            *(pool.generate(request(number)) for number in range(20, 25)), *map(pool.generate, in_round)
        )
        for sent in in_round:
            await pool.forget(sent.session_id)
        other_seeds = [replace(sent, sampling=replace(sent.sampling, seed=7)) for sent in in_round]
        await asyncio.gather(*map(pool.generate, other_seeds))
        again = [sorted(sent.session_id for sent in engine.requests if sent.in_round) for engine in engines]
        assert again == [sorted(ids * 3) for ids in placed]
        assert all(placed)

    run_with(engines, never, scenario)


def test_a_silent_engine_is_replaced_within_its_deadline_and_a_slow_or_a_paused_one_is_not():
    lost, slow, new = SlowEngine(silent=True), SlowEngine(takes_s=0.9 * SILENT_S), SlowEngine()

    async def scenario(pool: EnginePool) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        await asyncio.gather(pool.generate(request(0)), pool.generate(request(3)))
        assert SILENT_S <= now() - began <= 1.25 * SILENT_S + slow.takes_s
        assert lost.dead == "closed"
        await pool.pause()
        waits = asyncio.create_task(pool.generate(request(6, "s0")))
        await asyncio.sleep(100 * SILENT_S)
        assert not waits.done()
        await pool.resume()
        await waits

    run_with([lost, slow], lambda index: new if index == 0 else never(index), scenario)


class Computing(SlowEngine):
    """Says while it computes that it does, or completes requests and says nothing."""

    def __init__(self, *, says_so: bool) -> None:
        super().__init__()
        self.says_so = says_so

    async def generate(self, request: Request) -> Completion:
        for _ in range(request.prompt_ids[0]):
            await asyncio.sleep(SILENT_S / 4)
            self.busy_seconds += 1.0 if self.says_so else 0.0
        return Completion("", [1], [0.0], "stop", self.version)


def test_an_engine_is_not_silent_while_it_computes_for_long_or_completes_other_requests():
    async def one_long(pool: EnginePool) -> None:
        await pool.generate(request(20))

    async def many_short_beside_a_long_one(pool: EnginePool) -> None:
        long = asyncio.create_task(pool.generate(request(20)))
        for _ in range(10):
            await pool.generate(request(2))
        await long

    run_with([Computing(says_so=True)], never, one_long)
    run_with([Computing(says_so=False)], never, many_short_beside_a_long_one)


def test_an_engine_that_does_not_answer_a_push_is_replaced_and_the_push_succeeds(tmp_path):
    engines = [SlowEngine(), SlowEngine(silent=True)]
    new = SlowEngine()

    async def scenario(pool: EnginePool) -> None:
        await push(pool, tmp_path, 5)
        assert await pool.logprobs_of_tokens([1, 2]) == [5.0]
        await asyncio.sleep(100)
        assert (new.weights, new.version) == (5, 5)

    run_with(engines, lambda index: new if index == 1 else never(index), scenario)


class Refusing(SlowEngine):
    async def load_weights(self, shared: Any) -> None:
        raise ValueError("layers half open")


def test_an_engine_that_alone_refuses_weights_is_replaced(tmp_path):
    refusing, new = Refusing(), SlowEngine()

    async def scenario(pool: EnginePool) -> None:
        await push(pool, tmp_path, 5)
        replies = await asyncio.gather(*(pool.generate(request(number)) for number in range(4)))
        assert {reply.response_ids[0] for reply in replies} == {5}
        await asyncio.sleep(100)
        assert new.weights == 5

    run_with([SlowEngine(), refusing], lambda _: new, scenario)
    assert refusing.dead


class Stale(SlowEngine):
    async def load_weights(self, shared: Any) -> None:
        """Take nothing, without a word."""


def test_a_new_engine_that_does_not_compute_with_the_weights_it_took_gets_no_request(tmp_path):
    made = [Stale(), SlowEngine()]
    starts = iter(made)

    async def scenario(pool: EnginePool) -> None:
        await push(pool, tmp_path, 5)
        first.die("an error")
        assert (await pool.generate(request(0))).response_ids[0] == 5

    first = SlowEngine()
    run_with([first], lambda _: next(starts), scenario)
    assert made[0].requests == []


def dying() -> SlowEngine:
    engine = SlowEngine()
    engine.die("no memory left")
    return engine


def failing(index: int) -> SlowEngine:
    raise OSError(f"no device for {index}")


@pytest.mark.parametrize(
    ("start", "reason"),
    [(lambda _: dying(), "no memory left"), (failing, "3 times without completing a request.*no device for 0")],
)
def test_it_gives_up_when_replacing_does_not_help(start, reason):
    async def scenario(pool: EnginePool) -> None:
        with pytest.raises(EngineDied, match=reason):
            await pool.generate(request(0))
        with pytest.raises(EngineDied, match=reason):
            await pool.pause()

    run_with([dying()], start, scenario)


class Poisoned(SlowEngine):
    async def generate(self, request: Request) -> Completion:
        if request.prompt_ids[0] == 13:
            self.die("an illegal memory access")
        return await super().generate(request)


def test_a_request_that_kills_every_engine_ends_the_run_although_others_are_completed():
    made: list[SlowEngine] = []

    def start(_: int) -> SlowEngine:
        made.append(Poisoned())
        return made[-1]

    async def scenario(pool: EnginePool) -> None:
        async def others() -> None:
            for number in range(1000):
                await pool.generate(request(number * 20))

        playing = asyncio.create_task(others())
        with pytest.raises(EngineDied, match=r"4 engines died.*an illegal memory access"):
            await pool.generate(request(13))
        with pytest.raises(EngineDied):
            await playing

    run_with([Poisoned(), Poisoned()], start, scenario)
    assert len(made) <= 4


def test_a_death_now_and_then_never_ends_the_run():
    made = [SlowEngine()]

    def start(_: int) -> SlowEngine:
        made.append(SlowEngine())
        return made[-1]

    async def scenario(pool: EnginePool) -> None:
        for number in range(20):
            await pool.generate(request(number))
            made[-1].die("the machine went away")
        assert pool.busy_seconds == 20.0

    run_with(made[:1], start, scenario)
    assert len(made) == 20


def test_numbers_of_the_pool_are_those_of_its_engines():
    engines = [SlowEngine(max_model_len=300, busy_seconds=2.0), SlowEngine(max_model_len=200, busy_seconds=1.0)]

    async def scenario(pool: EnginePool) -> None:
        assert (pool.max_model_len, pool.busy_seconds) == (200, 1.5)

    run_with(engines, never, scenario)


def test_a_request_that_is_cancelled_takes_no_engine_with_it():
    engine = SlowEngine(takes_s=5)

    async def scenario(pool: EnginePool) -> None:
        waits = asyncio.create_task(pool.generate(request(0)))
        await asyncio.sleep(1)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        await pool.generate(request(0))

    run_with([engine], never, scenario)


def test_nothing_of_the_kept_weights_is_left_open(tmp_path):
    def open_files() -> set[str]:
        return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}

    async def scenario(pool: EnginePool) -> None:
        for version in range(3):
            await push(pool, tmp_path, version)
            gc.collect()
            assert [name for name in open_files() if str(tmp_path) in name] == [f"{tmp_path}/v{version} (deleted)"]

    run_with([SlowEngine()], never, scenario)
    gc.collect()
    assert [name for name in open_files() if str(tmp_path) in name] == []
