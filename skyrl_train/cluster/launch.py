"""Start the processes of a run where the placement puts them, and give the driver a learner and an engine of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skyrl_train import compute
from skyrl_train.cluster.actors import EngineActor, LearnerRank
from skyrl_train.cluster.deaths import cause_of, obituary
from skyrl_train.cluster.engine import RayEngine
from skyrl_train.cluster.learner import RayLearner
from skyrl_train.cluster.machine import Copies, Machine, refuse_unlike
from skyrl_train.cluster.parts import ComputingParts
from skyrl_train.cluster.placement import Placement, way_of_weights
from skyrl_train.cluster.session import Node, RaySession
from skyrl_train.cluster.start import registered_by_users
from skyrl_train.engine.base import EngineDied, LoadingEngine
from skyrl_train.engine.pool import EnginePool
from skyrl_train.run.run import RunRefused
from skyrl_train.weights.sent import BroadcastWeights
from skyrl_train.weights.shared_memory import SharedMemoryWeights, proof_ids_of

if TYPE_CHECKING:
    from skyrl_train.entrypoints.experiment import BasePPOExp
    from skyrl_train.weights.base import Weights

T = TypeVar("T")
REQUESTS_AT_ONCE = 100_000  # calls that an engine's actor answers beside each other
START_S = 900.0  # for an engine to load its model


@dataclass
class Cluster:
    """The processes of one run. `exp` builds each part in its process."""

    exp: BasePPOExp
    placement: Placement
    session: RaySession
    nodes: list[Node]
    copies: Copies
    _group: Any = None  # of GPUs: one bundle on each machine
    _rank_gpus: list[list[int]] = field(default_factory=list)
    _actors: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, exp: BasePPOExp, placement: Placement, session: RaySession | None = None) -> Cluster:
        """Choose the machines and look at each. ValueError, with the arithmetic, where one lacks what the run needs."""
        session = session or RaySession()
        cluster = cls(exp, placement, session, [], Copies(session.ray, {}))
        try:
            num_gpus = placement.devices_of_nodes if placement.on_gpu else [0] * placement.num_nodes
            cluster.nodes = session.nodes(num_gpus)
            cluster._look_at_machines()
            if placement.on_gpu:
                cluster._group = session.group(num_gpus, cluster.nodes)
        except BaseException:
            cluster.close()
            raise
        return cluster

    def _look_at_machines(self) -> None:
        ray, machines = self.session.ray, {}
        for node in self.nodes[1:]:
            options = {"num_cpus": 0, "scheduling_strategy": self.session.on(node), "max_restarts": 0}
            options["runtime_env"] = {"env_vars": self.session.environment(node)}
            machines[node] = self._made(ray, Machine, options, self.session.mark_on(node))
        try:
            refuse_unlike(ray, machines, Path(self.exp.cfg.trainer.ckpt_path), [Path(self.exp.model_path)])
        except ray.exceptions.RayError as error:
            raise ValueError(f"a machine of Ray's cluster cannot run this project: {_first_lines(error)}") from error
        self.copies = Copies(ray, {node.id: machine for node, machine in machines.items()})

    def start_ranks(self) -> RayLearner:
        """Start the processes of the ranks; they hold no policy yet."""
        ranks = [self._rank(self.session.ray, rank) for rank in range(len(self.placement.ranks))]
        learner = RayLearner(ranks, [self.nodes[node] for node in self.placement.node_of_ranks])
        learner.identify()
        if self.placement.on_gpu:
            self._rank_gpus = learner.answers([rank.gpu_ids.remote() for rank in ranks], starts=True)
        return learner

    async def start_engine(self, index: int) -> LoadingEngine:
        """Start one engine; also one that takes the place of a dead one."""
        actor = self._engine(self.session.ray, index)
        name, identity = f"engine {index} of {len(self.placement.engines)}", None
        node = self.nodes[self.placement.node_of_engines[index]]
        name += f" on {node.name}" if len(self.nodes) > 1 else ""
        exceptions = self.session.ray.exceptions
        try:
            identity = await actor.identity.remote()
            max_model_len = await actor.build.remote(self.exp)
        except exceptions.RayActorError as error:
            raise EngineDied(obituary(name, identity, error)) from None
        except exceptions.ActorUnschedulableError as error:
            raise EngineDied(f"{name} cannot be started: {' '.join(str(error).split())[:200]}") from None
        except exceptions.RayTaskError as error:
            self.session.ray.kill(actor)
            raise cause_of(error, name, identity) from error
        except BaseException:
            self.session.ray.kill(actor)
            raise
        return RayEngine(actor, name, identity, max_model_len, node, self.copies)

    async def start_engines(self) -> EnginePool:
        """Start all engines at the same time."""
        count = len(self.placement.engines)
        return EnginePool(await _together(*map(self.start_engine, range(count))), self.start_engine)

    def close(self) -> None:
        """End every process of the run, also where Ray itself is another's and goes on."""
        for actor in self._actors:
            self.session.ray.kill(actor)
        if self._group is not None:
            self.session.ray.util.remove_placement_group(self._group)
        self.session.close()

    def _rank(self, ray: Any, rank: int) -> Any:
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "concurrency_groups": {"progress": 1, "saving": 1}}
        node = self.placement.node_of_ranks[rank]
        options["scheduling_strategy"] = self.session.on(self.nodes[node])
        options["runtime_env"] = {"env_vars": self.session.environment(self.nodes[node], **self._threads())}
        if self.placement.on_gpu:
            options |= {"num_gpus": 1, "scheduling_strategy": self._in_bundle(node)}
        count = len(self.placement.ranks)
        return self._made(ray, LearnerRank, options, rank, count, self._num_threads, registered_by_users())

    def _engine(self, ray: Any, index: int) -> Any:
        """Start the actor. On shared GPUs it gets those of its ranks by name, and asks Ray for none."""
        placement, devices = self.placement, self.placement.engines[index]
        variables = self._threads()
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": REQUESTS_AT_ONCE}
        node = placement.node_of_engines[index]
        options["scheduling_strategy"] = self.session.on(self.nodes[node])
        if placement.on_gpu and set(devices) & set(placement.ranks):
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for d in devices for gpu in self._rank_gpus[d])
            variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
            options["scheduling_strategy"] = self._in_bundle(node)
        elif placement.on_gpu:
            options |= {"num_gpus": len(devices), "scheduling_strategy": self._in_bundle(node)}
        options["runtime_env"] = {"env_vars": self.session.environment(self.nodes[node], **variables)}
        return self._made(ray, EngineActor, options, self._num_threads)

    @property
    def _num_threads(self) -> int | None:
        return None if self.placement.on_gpu else self.placement.num_threads

    def _threads(self) -> dict[str, str]:
        """Return what OpenMP reads when it is loaded: Ray would set it to 1."""
        return {} if self._num_threads is None else {"OMP_NUM_THREADS": str(self._num_threads)}

    def _in_bundle(self, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)

    def _made(self, ray: Any, cls: type, options: dict[str, Any], *args: Any) -> Any:
        groups = options.pop("concurrency_groups", None)
        remote = ray.remote(concurrency_groups=groups)(cls) if groups else ray.remote(cls)
        self._actors.append(remote.options(**options).remote(*args))
        return self._actors[-1]


@asynccontextmanager
async def cluster_of(exp: BasePPOExp, placement: Placement) -> AsyncGenerator[ComputingParts]:
    """Start everything, and end it with the block. `exp` is BasePPOExp.for_other_processes()."""
    try:
        cluster = await _in_compute_thread(Cluster.start, exp, placement)
    except ValueError as error:  # what only Ray's cluster can tell
        raise RunRefused(str(error)) from error
    try:
        learner = await _in_compute_thread(cluster.start_ranks)
        try:
            try:
                engine, _ = await _together(cluster.start_engines(), _in_compute_thread(learner.build, exp))
            except ValueError as error:  # a setting that only the part itself can refuse
                raise RunRefused(str(error)) from error
            yield ComputingParts(learner, engine, _weights_between(exp, placement, engine))
        finally:
            learner.close()
            await _in_compute_thread(lambda: None)  # a call that was under way there has ended, and asks Ray no more
    finally:
        cluster.close()


def _weights_between(exp: BasePPOExp, placement: Placement, engine: EnginePool) -> Weights:
    ids, dtype, takes_turns = proof_ids_of(exp.tokenizer), exp.compute_dtype, placement.takes_turns
    way = way_of_weights(exp.cfg, placement)
    if way == "file":
        return SharedMemoryWeights(ids, dtype, takes_turns=takes_turns)
    num_readers = 1 if way == "ipc" else 0  # on a GPU of a rank there is one worker of an engine
    return BroadcastWeights(
        ids, dtype, num_engines=lambda: engine.num_up, num_readers=num_readers, takes_turns=takes_turns
    )


async def _together(*calls: Awaitable[Any]) -> list[Any]:
    """Return all results. After an error nothing goes on: it would ask Ray, which has ended by then and starts anew."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _in_compute_thread(call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    return asyncio.wrap_future(compute.submit(call, *args))


def _first_lines(error: BaseException) -> str:
    """Return what an error of Ray says, in one line: its last line names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} ... {lines[-1]}"[:500] if len(lines) > 1 else "".join(lines)[:500]
