"""Traces of a whole small run, read as a viewer reads them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.records.advantages import advantages_path, read_advantages
from skyrl_train.run.records.profile import Profile, trace_of
from skyrl_train.run.records.trajectories import read_trajectories
from skyrl_train.run.run_folder import profile_steps
from skyrl_train.spans import recording, span
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model

Event = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a profiled run of two steps, 2 prompts x 4 episodes x 2 turns, two optimizer steps a step."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("even", EvenEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    status = main(
        [
            f"data.train_data=['{folder}/data.jsonl']",
            f"data.val_data=['{folder}/data.jsonl']",
            f"trainer.policy.model.path={folder}/model",
            f"trainer.ckpt_path={folder}/run",
            f"trainer.export_path={folder}/run/exports",
            "trainer.profile=true",
            "trainer.device=cpu",
            "trainer.bf16=false",
            "environment.env_class=even",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=1",
            "trainer.algorithm.use_kl_loss=false",
            "trainer.eval_interval=2",
            "generator.n_samples_per_prompt=4",
            "generator.max_turns=2",
            "generator.sampling_params.max_generate_length=8",
        ]
    )
    torch.set_num_threads(threads)
    skyrl_gym.envs.deregister("even")
    assert status == 0
    return folder / "run"


def trace(run_folder: Path, step: int) -> list[Event]:
    path = run_folder / "profile" / f"step_{step}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def complete(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def within(outer: Event, inner: Event) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3  # µs


def by_lane(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    """Each lane's spans by their begin, a longer one before those within it."""
    lanes: dict[tuple[int, int], list[Event]] = {}
    for event in sorted(complete(events), key=lambda event: (event["ts"], -event["dur"])):
        lanes.setdefault((event["pid"], event["tid"]), []).append(event)
    return lanes


def parents(lane: list[Event]) -> list[tuple[str | None, str]]:
    """(name of the span around it, its own name); a span that leaves the one around it is refused."""
    found, around = [], []
    for event in lane:
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        assert not around or within(around[-1], event), (around[-1], event)
        found.append((around[-1]["name"] if around else None, event["name"]))
        around.append(event)
    return found


def test_every_step_has_a_file_and_the_summary_names_the_newest(finished):
    assert list(profile_steps(finished).values()) == [0, 1, 2]
    assert json.loads((finished / "summary.json").read_text())["profile"] == str(finished / "profile/step_2.json.gz")


def test_a_trace_is_in_chromes_format(finished):
    for step in (0, 1, 2):
        events = trace(finished, step)
        for event in events:
            assert {"ph", "name", "pid", "tid"} <= event.keys()
            assert event["ph"] in "MX"
            if event["ph"] == "X":
                assert event["ts"] > 0
                assert event["dur"] >= 0
                assert isinstance(event["args"], dict)
        named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
        assert named == by_lane(events).keys()


def test_spans_nest_in_every_lane_and_stand_where_they_belong(finished):
    events = trace(finished, 2)
    found: Counter[tuple[str | None, str]] = Counter()
    for lane in by_lane(events).values():
        found.update(parents(lane))
    phases = ("rollout", "logprobs", "advantages", "update", "weights")
    assert {name: found["step", name] for name in phases} == dict.fromkeys(phases, 1)
    assert found[None, "step"] == found[None, "evaluation"] == found[None, "checkpoint"] == 1
    assert found[None, "episode"] == 8 + 4  # trained on and evaluated
    assert found["episode", "generate"] == found["episode", "environment step"] >= 12
    assert found["episode", "environment init"] == found["episode", "environment close"] == 12
    assert found[None, "engine step"] == found["engine step", "sample"] >= 8
    assert found["micro batch", "backward"] == found[None, "optimizer step"] == 2


def test_engine_steps_say_how_much_they_computed(finished):
    steps = [e["args"] for e in complete(trace(finished, 1)) if e["name"] == "engine step"]
    assert max(step["sequences"] for step in steps) == 8
    assert all(step["tokens"] >= step["sequences"] for step in steps)
    assert steps[0]["tokens"] > steps[-1]["tokens"]  # prompts first, then a token for each


def test_what_happens_in_threads_and_episodes_lies_in_its_phase(finished):
    """All lanes tell the time by the same clock."""
    events = complete(trace(finished, 1))
    [rollout] = [e for e in events if e["name"] == "rollout"]
    [update] = [e for e in events if e["name"] == "update"]
    assert all(within(rollout, e) for e in events if e["name"] in ("episode", "engine step"))
    assert all(within(update, e) for e in events if e["name"] in ("backward", "optimizer step"))


def test_the_phases_cover_a_step(finished):
    for step in (1, 2):
        events = complete(trace(finished, step))
        [whole] = [e for e in events if e["name"] == "step"]
        lane = by_lane(events)[whole["pid"], whole["tid"]]
        covered = sum(e["dur"] for (around, _), e in zip(parents(lane), lane, strict=True) if around == "step")
        assert covered > 0.9 * whole["dur"]


def test_a_step_that_fails_leaves_its_trace_and_one_that_is_not_wanted_nothing(tmp_path):
    def fail() -> None:
        with span("work"):
            raise ValueError("broken")

    for enabled in (False, True):
        with pytest.raises(ValueError, match="broken"), Profile(tmp_path, enabled=enabled).step(3):
            fail()
        assert list(profile_steps(tmp_path).values()) == ([3] if enabled else [])
    assert [event["name"] for event in complete(trace(tmp_path, 3))] == ["work"]


def test_times_are_microseconds():
    with recording() as recorder, span("work"):
        pass
    [event] = complete(trace_of(recorder)["traceEvents"])
    [work] = recorder.spans
    assert event["ts"] * 1000 == pytest.approx(work.start_ns)
    assert event["dur"] * 1000 == pytest.approx(work.end_ns - work.start_ns)


def test_the_advantages_that_the_run_learned_from_are_kept_beside_its_episodes(finished):
    """A group's advantages have mean 0, and stand on the tokens that were sampled."""
    for step in (1, 2):
        groups: dict[str, list[float]] = {}
        for episode in read_trajectories(finished / f"trajectories/train_step_{step:06d}.jsonl.zst"):
            rows = read_advantages(advantages_path(finished, step), episode)
            told = [(segment.sampled, value) for segment, row in zip(episode.segments, rows, strict=True)
                    for _, value in row or []]  # fmt: skip
            assert told
            assert all((value is not None) == sampled for sampled, value in told)
            [advantage] = {value for _, value in told if value is not None}
            groups.setdefault(episode.uid, []).append(advantage)
        assert len(groups) == 2
        for advantages in groups.values():
            assert len(advantages) == 4
            assert sum(advantages) == pytest.approx(0, abs=1e-4)
        assert any(any(advantages) for advantages in groups.values())
