"""Learner ranks and engines in processes of their own, under a Ray of the tests' own: calls, numbers, deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from skyrl_gym.envs import deregister, register
from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.cluster.actors import Identity
from skyrl_train.cluster.deaths import NUM_LINES, cause_of, last_words
from skyrl_train.cluster.engine import RayEngine
from skyrl_train.cluster.launch import Cluster
from skyrl_train.cluster.learner import RayLearner
from skyrl_train.cluster.placement import Placement
from skyrl_train.cluster.session import RaySession
from skyrl_train.cluster.start import import_ray
from skyrl_train.cluster.travel import arrays_of
from skyrl_train.config import load_config
from skyrl_train.engine.base import Completion, EngineDied, Request, SamplingParams
from skyrl_train.engine.pool import EnginePool
from skyrl_train.entrypoints.experiment import BasePPOExp
from skyrl_train.learner.base import LearnerDied
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.types import Batch
from skyrl_train.weights.sent import BroadcastWeights
from skyrl_train.weights.shared_memory import proof_ids_of, read_shared
from tests.fakes import EvenEnv
from tests.skyrl_train.batches import random_batch
from tests.skyrl_train.cluster.runs import TWO, arguments, write_given

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
IDS = [5, 9, 2, 77, 120, 31]
LONG = Request(IDS, SamplingParams(max_tokens=400, min_tokens=400, seed=1), "s")


@dataclass
class Started:
    """Two ranks and one engine, with the experiment that they were built by."""

    exp: BasePPOExp
    cluster: Cluster
    learner: RayLearner
    engine: RayEngine


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    register("even", EvenEnv)
    folder = tmp_path_factory.mktemp("cluster")
    exp = BasePPOExp(load_config([*arguments(write_given(folder), folder / "run"), *TWO]))
    cluster = Cluster.start(exp.for_other_processes(), exp.placement, RaySession(num_gpus=3))
    try:
        learner = cluster.start_ranks()
        learner.build(cluster.exp)
        engine = asyncio.run(cluster.start_engine(0))
        assert isinstance(engine, RayEngine)
        yield Started(exp, cluster, learner, engine)
    finally:
        cluster.close()
        deregister("even")


def one_process(exp: BasePPOExp) -> TorchLearner:
    """The learner that the same settings give in this process."""
    return TorchLearner(
        exp.get_policy(),
        exp.trainer_section,
        num_training_steps=4,
        temperature=1.0,
        reference=exp.get_reference(exp.get_policy()),
    )


def test_two_ranks_learn_what_one_process_learns_and_both_ways_of_the_batch_keep_every_number(started, tmp_path):
    exp, learner = started.exp, started.learner
    ours = one_process(exp)
    batch = random_batch(num_prompts=2)
    theirs, alone = learner.add_logprobs(batch), ours.add_logprobs(batch)
    assert theirs.ref_logprobs is not None
    assert alone.ref_logprobs is not None
    torch.testing.assert_close(theirs.ref_logprobs, alone.ref_logprobs, atol=1e-5, rtol=0)
    assert torch.equal(theirs.input_ids, batch.input_ids)
    told: list[tuple[int, int]] = []
    algorithm = exp.cfg.trainer.algorithm
    got = learner.update(add_advantages(theirs, algorithm), lambda done, total: told.append((done, total)))
    expected = ours.update(add_advantages(alone, algorithm))
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (learner.policy_version, ours.policy_version) == (1, 1)
    assert all(done <= total for done, total in told)
    published = dict(read_shared(learner.publish(tmp_path / "weights")))
    alone_weights = dict(read_shared(ours.publish(tmp_path / "alone")))
    assert published.keys() == alone_weights.keys()
    apart = torch.cat([(published[name] - weight).abs().flatten() for name, weight in alone_weights.items()])
    # Adam makes a step of up to the learning rate, 1e-3, of a gradient that is rounding alone: of very few.
    assert (apart > 1e-6).double().mean() < 1e-3
    assert apart.max() <= 2e-3


def test_a_death_that_an_actor_reports_is_told_with_its_name_and_last_lines(tmp_path):
    (tmp_path / "worker.err").write_text("the cache needs more memory\n")
    identity = Identity(pid=7, log=str(tmp_path / "worker"), gpus=None)
    said = import_ray().exceptions.RayTaskError("build", "", EngineDied("a process of vLLM ended"))
    death = cause_of(said, "engine 1 of 2", identity)
    assert isinstance(death, EngineDied)
    assert str(death) == (
        "engine 1 of 2: a process of vLLM ended\n"
        f"The last lines of {tmp_path}/worker.err:\n  the cache needs more memory"
    )


def test_what_was_wrong_stands_in_front_of_the_last_lines_however_far_up_the_log_has_it(tmp_path):
    lines = [
        "(EngineCore_DP0 pid=9) ERROR 11-28 12:00:00 [core.py:7] ValueError: No available memory for the cache blocks.",
        *(f"  frame {number}" for number in range(40)),
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    (tmp_path / "worker.err").write_text("\n".join(lines))
    told = last_words(Identity(pid=7, log=str(tmp_path / "worker"), gpus=None)).splitlines()
    assert told[1:3] == [
        "It said: ValueError: No available memory for the cache blocks.",
        f"The last lines of {tmp_path}/worker.err:",
    ]
    assert len(told) == 3 + NUM_LINES


async def test_an_engine_with_pushed_weights_has_the_learners_logprobs_and_samples_by_seed(started, tmp_path):
    engine, learner = started.engine, started.learner
    await engine.pause()
    await engine.load_weights(learner.publish(tmp_path / "weights"))
    await engine.weights_changed(7)
    await engine.resume()
    assert await engine.logprobs_of_tokens(IDS) == pytest.approx(learner.logprobs_of_tokens(IDS), abs=1e-4)
    requests = [Request(IDS, SamplingParams(max_tokens=6, seed=seed), f"session {seed}") for seed in (1, 2, 1)]
    one, two, again = await asyncio.gather(*(engine.generate(request) for request in requests))
    assert one.response_ids == again.response_ids != two.response_ids
    assert one.policy_version == 7
    assert engine.busy_seconds > 0


class SamePlace(RayEngine):
    """The engine again, as one that was started in the place of a lost one."""

    async def close(self) -> None:
        self._is_closed = True


@pytest.mark.parametrize("num_readers", [0, 1], ids=["over gloo, which stands for NCCL", "as CUDA IPC would"])
async def test_weights_of_two_ranks_reach_the_engine_and_one_that_is_started_later_gets_them_too(started, num_readers):
    engine, learner = started.engine, started.learner
    parts = engine._actor, engine._name, engine._identity, engine.max_model_len, engine._node, engine._copies

    async def start(_: int) -> SamePlace:
        return SamePlace(*parts)

    first = await start(0)
    pool = EnginePool([first], start)
    ids = proof_ids_of(started.exp.tokenizer)
    weights = BroadcastWeights(ids, torch.float32, num_engines=lambda: pool.num_up, num_readers=num_readers)
    for _ in range(2):  # the second push goes on with the group of the first
        await weights.push(learner, pool)
        assert weights.metrics["weights/max_logprob_difference"] < 1e-4
        assert weights.metrics["weights/megabytes"] > 0
    pids = [identity_of(started, rank).pid for rank in range(2)]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(tuple(f"torch_{pid}_" for pid in pids))]
    await engine.pause()
    request = Request(IDS, SamplingParams(max_tokens=6, seed=1), "session")
    waiting = asyncio.create_task(pool.generate(request))
    await first.close()
    assert (await waiting).policy_version == learner.policy_version
    again = await pool.generate(request)
    assert again == await waiting


async def test_an_error_of_the_other_process_arrives_as_it_was_raised(started):
    with pytest.raises(ValueError, match="the prompt is empty"):
        await started.engine.generate(Request([], SamplingParams(max_tokens=2), "s"))
    with pytest.raises(ValueError, match="the batch has no advantages"):
        started.learner.update(random_batch())


def test_what_the_ranks_write_one_process_reads(started, tmp_path):
    started.learner.save(tmp_path / "saved").result()
    alone = one_process(started.exp)
    alone.load(tmp_path / "saved")
    assert alone.policy_version == started.learner.policy_version
    assert alone.logprobs_of_tokens(IDS) == pytest.approx(started.learner.logprobs_of_tokens(IDS), abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir() if path.suffix == ".safetensors") == [
        "rank_0_of_2.safetensors", "rank_1_of_2.safetensors",
    ]  # fmt: skip


def test_every_process_sees_the_gpus_of_its_place(started):
    """Ray takes our word for three GPUs: rank 0 and engine 0 share one, engine 1 lies apart in another test's words."""
    session, exp = started.cluster.session, started.cluster.exp
    shared = Cluster.start(exp, Placement(True, False, (0, 1), ((0, 1),), 1), session)
    ranks = shared.start_ranks()
    engine = shared._engine(session.ray, 0)
    try:
        seen = [identity.gpus for identity in ranks._identities if identity is not None]
        assert len(set(seen)) == 2
        assert session.ray.get(engine.identity.remote()).gpus == ",".join(map(str, seen))
        with pytest.raises(ValueError, match="4 GPUs are needed, and Ray's cluster has 3"):
            session.nodes([4])
    finally:
        ranks.close()
        session.ray.kill(engine)
        session.ray.util.remove_placement_group(shared._group)


def test_every_process_gets_as_much_of_a_busy_machine_as_the_driver(started):
    engine = started.engine._identity
    pids = [identity_of(started, 0).pid, identity_of(started, 1).pid, engine.pid]
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [niceness] * 3


async def test_a_dead_engine_says_so_to_everyone_who_waits(started):
    engine = await started.cluster.start_engine(1)
    os.kill(engine._identity.pid, signal.SIGSTOP)  # it finishes none of them first
    waiting = [asyncio.create_task(engine.generate(LONG)) for _ in range(3)]
    await asyncio.sleep(0.2)
    os.kill(engine._identity.pid, signal.SIGKILL)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, EngineDied)
        assert f"engine 1 of 2 (process {engine._identity.pid}) died: it was killed" in str(outcome)
    await engine.close()


def seen_often(engine: RayEngine, silent_looks: int) -> RayEngine:
    """The same engine, asked many times a second whether it computes."""
    return RayEngine(
        engine._actor,
        engine._name,
        engine._identity,
        engine.max_model_len,
        engine._node,
        engine._copies,
        look_s=0.05,
        silent_looks=silent_looks,
    )


async def test_an_engine_that_completes_nothing_for_long_shows_that_it_computes(started):
    """On a busy machine the looks may come too late for one wave of requests, so there are several."""
    for _ in range(20):
        engine = seen_often(started.engine, silent_looks=10_000)
        waiting = [asyncio.create_task(engine.generate(LONG)) for _ in range(8)]
        done: set[asyncio.Task[Completion]] = set()
        while not engine.busy_seconds and not done:
            done, _ = await asyncio.wait(waiting, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*waiting)
        if not done:
            return
    raise AssertionError("nothing was seen of its work before it had completed something")


def identity_of(started: Started, rank: int) -> Identity:
    found = started.learner._identities[rank]
    assert found is not None
    return found


def long_batch(num_prompts: int = 120) -> Batch:
    """A mini batch for each two prompts."""
    return random_batch(num_prompts=num_prompts)


def impatient(started: Started, silent_s: float, stuck_s: float) -> RayLearner:
    """The same ranks, behind a learner that waits for less long."""
    learner = RayLearner(started.learner._ranks, started.learner._nodes, silent_s=silent_s, stuck_s=stuck_s)
    learner.identify()
    return learner


def test_a_stopped_rank_is_named_with_what_it_did_last_and_a_long_computation_is_not_taken_for_a_hang(started):
    learner, batch = impatient(started, silent_s=8.0, stuck_s=600.0), random_batch(num_prompts=2)
    expected = started.learner.add_logprobs(batch)
    stopped = identity_of(started, 1).pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        with pytest.raises(LearnerDied, match=rf"learner rank 1 of 2 \(process {stopped}\) hangs: it has not answered"):
            learner.add_logprobs(batch)
    finally:
        os.kill(stopped, signal.SIGCONT)
    num_prompts, took_s = 120, 0.0
    while took_s < 3.0:  # else too short to be taken for a hang
        logprobs = started.learner.add_logprobs(long_batch(num_prompts))
        long = add_advantages(logprobs, started.exp.cfg.trainer.algorithm)
        began = time.monotonic()
        impatient(started, silent_s=600.0, stuck_s=3.0).update(long)
        num_prompts, took_s = 2 * num_prompts, time.monotonic() - began
    assert torch.equal(started.learner.add_logprobs(batch).ref_logprobs, expected.ref_logprobs)


def test_ranks_that_wait_for_each_other_are_named_with_the_lines_where_they_wait(started):
    learner, arrays = impatient(started, silent_s=600.0, stuck_s=6.0), arrays_of(random_batch(num_prompts=2))
    first, second = started.learner._ranks
    call = first.add_logprobs.remote(arrays)  # and the other rank is not asked
    with pytest.raises(LearnerDied, match=r"no rank has computed.*rank 0.* is in add_logprobs, skyrl_train/.*:\d+ in "):
        learner.answers([call])
    started.learner.answers([call, second.add_logprobs.remote(arrays)])


def test_a_dead_rank_ends_the_call_with_its_name_and_last_lines_while_the_other_waits_for_it(started, tmp_path):
    """The ranks are gone after it."""
    pid, log = identity_of(started, 1).pid, identity_of(started, 1).log
    assert log is not None
    with Path(log).open("a") as file:
        file.write("what rank 1 said last\n")
    batch = started.learner.add_logprobs(long_batch())
    batch = add_advantages(batch, started.exp.cfg.trainer.algorithm)
    killed: list[float] = []

    def kill_once(done: int, total: int) -> None:
        if not killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(LearnerDied) as caught:
        started.learner.update(batch, kill_once)  # rank 0 is told by the connection that was closed, and Ray by itself
    assert time.monotonic() - killed[0] < 200
    assert f"learner rank 1 of 2 (process {pid}) died: it was killed" in str(caught.value)
    assert str(caught.value).endswith("what rank 1 said last")
    with pytest.raises(LearnerDied):
        started.learner.publish(tmp_path / "weights")
    began = time.monotonic()
    started.learner.close()
    assert time.monotonic() - began < 200


async def test_a_stopped_engine_is_ended_with_its_name_and_everyone_who_waits_hears_of_it(started):
    """The engine is gone after it."""
    engine = seen_often(started.engine, silent_looks=20)
    pid = engine._identity.pid
    os.kill(pid, signal.SIGSTOP)
    outcomes = await asyncio.gather(*(engine.generate(LONG) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, EngineDied) for outcome in outcomes)
    assert all(f"engine 0 of 2 (process {pid}) hung and was ended" in str(outcome) for outcome in outcomes)
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    assert not alive
