from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from skyrl_train.spans import MAX_EPISODE_LANES, Recorder, each_in_a_span, episode_lane, recording, span


def lanes(recorder: Recorder) -> list[tuple[str, str]]:
    return [(each.name, each.lane) for each in recorder.spans]


def test_a_span_knows_its_thread_its_details_and_when_it_was():
    with recording() as recorder, span("outer"), span("inner", tokens=3):
        pass
    inner, outer = recorder.spans
    assert (inner.name, inner.details, outer.name, outer.details) == ("inner", {"tokens": 3}, "outer", {})
    assert outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns
    assert inner.lane == outer.lane == threading.current_thread().name


def test_without_a_recorder_nothing_is_kept():
    with span("before"):
        pass
    with recording() as recorder:
        pass
    with span("after"):
        pass
    assert recorder.spans == []


def test_a_span_that_fails_is_recorded_and_the_error_goes_on():
    with recording() as recorder, pytest.raises(ValueError, match="no"), span("broken"):
        raise ValueError("no")
    assert [each.name for each in recorder.spans] == ["broken"]


def test_one_process_has_one_recorder_at_a_time():
    with recording(), pytest.raises(RuntimeError, match="already"), recording():
        pass
    with recording():
        pass


def test_each_item_has_a_span_around_what_is_done_with_it():
    with recording() as recorder:
        for number in each_in_a_span("item", [1, 2], lambda item: {"value": item}):
            with span(f"work on {number}"):
                pass
    assert [(each.name, each.details) for each in recorder.spans] == [
        ("work on 1", {}), ("item", {"value": 1}), ("work on 2", {}), ("item", {"value": 2}),
    ]  # fmt: skip


async def test_episodes_at_once_have_a_lane_each_and_free_lanes_are_used_again():
    both_play = asyncio.Barrier(2)

    async def step() -> None:
        with span("step"):
            await asyncio.sleep(0)

    async def play(name: str) -> None:
        with episode_lane(name):
            await both_play.wait()
            await asyncio.ensure_future(step())  # a task of its own, as environments are called

    with recording() as recorder:
        async with asyncio.TaskGroup() as tasks:
            for name in ("a", "b"):
                tasks.create_task(play(name))
        with episode_lane("c"), span("step"):
            pass
        with span("outside"):
            pass
    found = lanes(recorder)
    assert {lane for name, lane in found if name in "ab"} == {"episode lane 1", "episode lane 2"}
    assert sorted(lane for name, lane in found[:4] if name == "step") == ["episode lane 1", "episode lane 2"]
    assert found[-3:] == [
        ("step", "episode lane 1"), ("c", "episode lane 1"), ("outside", threading.current_thread().name),
    ]  # fmt: skip


async def test_episodes_beyond_the_last_lane_are_counted_and_their_spans_left_out():
    everyone = asyncio.Barrier(MAX_EPISODE_LANES + 1)

    async def play() -> None:
        with episode_lane("episode"):
            await everyone.wait()
            with span("step"):
                pass

    with recording() as recorder:
        await asyncio.gather(*(play() for _ in range(MAX_EPISODE_LANES + 1)))
    assert recorder.num_left_out == 1
    assert len(recorder.spans) == 2 * MAX_EPISODE_LANES
    assert len(set(lanes(recorder))) == 2 * MAX_EPISODE_LANES


async def test_another_threads_spans_stay_in_its_own_lane_whoever_asked_for_them():
    def compute() -> None:
        with span("compute"):
            pass

    with recording() as recorder, ThreadPoolExecutor(1, "worker") as executor, episode_lane("episode"):
        await asyncio.wrap_future(executor.submit(compute))
    assert lanes(recorder) == [("compute", "worker_0"), ("episode", "episode lane 1")]
