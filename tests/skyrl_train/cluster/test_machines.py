"""A run on two machines: Ray's own test cluster has two nodes on this one. A node is killed, and the run goes on."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from skyrl_train.cluster import machine
from skyrl_train.cluster.machine import Copies, Machine, refuse_unlike
from skyrl_train.cluster.session import RaySession
from skyrl_train.run.metrics import read_metrics
from skyrl_train.weights.shared_memory import read_shared, write_shared
from tests.skyrl_train.cluster.runs import NUM_STEPS, family_after_step, start, write_given

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
ON_TWO = [
    "trainer.strategy=fsdp2", "trainer.placement.policy_num_nodes=2", "generator.num_inference_engines=2",
]  # fmt: skip
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """Two nodes of Ray's, for the processes that the tests start."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(**NODE, include_dashboard=False)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield SimpleNamespace(cluster=cluster, second=cluster.add_node(**NODE))
    finally:
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
        cluster.shutdown()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_given(tmp_path_factory.mktemp("machines"))


@pytest.mark.timeout(900)
def test_a_dead_machine_ends_the_run_with_its_name_and_nothing_is_left(machines, given):
    process = start(given, *ON_TWO, "trainer.epochs=1000")
    family = family_after_step(2, given / "run", process)
    machines.cluster.remove_node(machines.second, allow_graceful=False)
    began = time.monotonic()
    output, _ = process.communicate(timeout=400)
    seconds = time.monotonic() - began
    assert process.returncode == 1
    assert "CPU device 0 of machine 0: rank 0 and engine 0; CPU device 1 of machine 1: rank 1 and engine 1" in output
    assert "stopped: learner rank 1 of 2 on machine " in output, output[-2000:]
    assert "Traceback" not in output
    assert seconds < 300  # it would wait ten minutes for the others
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


@pytest.mark.timeout(900)
def test_the_same_command_goes_on_once_there_are_as_many_machines_again(machines, given):
    """After the run of the test above."""
    machines.second = machines.cluster.add_node(**NODE)
    steps = read_metrics(given / "run" / "metrics.jsonl")[-1]["step"]
    process = start(given, *ON_TWO, f"trainer.epochs={-(-steps // NUM_STEPS) + 1}")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    assert "resuming after step" in output
    lines = read_metrics(given / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert all(line["weights/max_logprob_difference"] < 1e-4 for line in lines[1:])
    assert all(line["policy/grad_norm"] > 0 for line in lines[1:])


class UnsharedMachine(Machine):
    """A machine on which `folder` is another one: an empty file system of its own lies over it."""

    def __init__(self, mark: str, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000):  # CLONE_NEWNS: mounts of this process alone
            raise PermissionError(ctypes.get_errno(), "no mounts of one's own")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
        super().__init__(mark)


@pytest.fixture
def joined(machines, tmp_path) -> Iterator[Any]:
    """This process as a driver of the cluster, with Machine actors of two kinds on the other node."""
    session = RaySession()
    ray, (here, other) = session.ray, session.nodes([0, 0])
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": session.on(other)}
    options["runtime_env"] = {"env_vars": session.environment(other)}
    like = ray.remote(Machine).options(**options).remote(session.mark_on(other))
    unlike = ray.remote(UnsharedMachine).options(**options).remote(session.mark_on(other), tmp_path)
    yield SimpleNamespace(session=session, here=here, other=other, like=like, unlike=unlike)
    ray.kill(like)
    ray.kill(unlike)
    session.close()


@pytest.mark.timeout(600)
async def test_what_a_machine_must_have_and_gets(joined, tmp_path, monkeypatch):
    session, other = joined.session, joined.other
    with pytest.raises(ValueError, match=r"needs 3 machines, and Ray's cluster has 2: .*with 0 GPUs"):
        session.nodes([0, 0, 0])
    with pytest.raises(ValueError, match=r"needs 2 machines with 1, 1 GPUs, the first of them this one"):
        session.nodes([1, 1])
    refuse_unlike(session.ray, {other: joined.like}, tmp_path / "run", [tmp_path, Path("a/hub-name")])
    assert list((tmp_path / "run").iterdir()) == []
    try:
        with pytest.raises(ValueError, match=rf"is not shared: machine {other.address} .*folder that all"):
            refuse_unlike(session.ray, {other: joined.unlike}, tmp_path / "run", [])
    except session.ray.exceptions.RayError as error:
        assert "no mounts of one's own" in str(error)  # noqa: PT017 (where the tests may not mount anything)
    lacking = tmp_path / "model"
    lacking.mkdir()
    with pytest.raises(ValueError, match=r"model is missing on machine"):
        refuse_unlike(session.ray, {other: joined.unlike}, Path("/tmp"), [lacking])

    monkeypatch.setattr(machine, "PIECE", 1000)
    named = {"a": torch.arange(999.0), "b": torch.ones(7, 11, dtype=torch.bfloat16)}
    copies = Copies(session.ray, {other.id: joined.like})
    for version in (1, 2, 3):
        shared = write_shared(named.items(), tmp_path / f"weights{version}", version)
        there, again = await asyncio.gather(copies.on(other.id, shared), copies.on(other.id, shared))
        assert there == again
        assert there.path != shared.path == (await copies.on(joined.here.id, shared)).path
        assert {name: tensor.tolist() for name, tensor in read_shared(there)} == {
            name: tensor.tolist() for name, tensor in named.items()
        }
