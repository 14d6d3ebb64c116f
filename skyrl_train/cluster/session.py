"""Ray for the length of a run: joined where RAY_ADDRESS names a cluster, else started here and ended with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import skyrl_train
from skyrl_train.cluster import reaper
from skyrl_train.cluster.start import import_ray

OBJECT_STORE_BYTES = 512 * 2**20  # batches alone travel through it: 32 MB for a million tokens
GROUP_S = 60  # for the GPUs of the run to become free
REAPER_S = 12


class Node(NamedTuple):
    """A machine of Ray's cluster, by Ray's id of it, and its address."""

    id: str
    address: str

    @property
    def name(self) -> str:
        return f"machine {self.address} (Ray's node {self.id[:8]})"


class RaySession:
    """Ray while a run lasts, and the mark that all of its processes carry (reaper.py)."""

    def __init__(self, *, num_gpus: int | None = None) -> None:
        """num_gpus: of this machine; None lets Ray count. It is only said where Ray is started here."""
        self.ray = import_ray()
        self.mark = uuid.uuid4().hex
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", reaper.__file__, self.mark, str(os.getpid())], start_new_session=True
        )
        self._is_ours = not self.ray.is_initialized()
        if self._is_ours:
            self._init(num_gpus)
        self._here = self.ray.get_runtime_context().get_node_id()

    def _init(self, num_gpus: int | None) -> None:
        address = os.environ.get("RAY_ADDRESS", "")
        if address.startswith("ray://"):
            raise ValueError(
                f"RAY_ADDRESS={address} is for a client of a cluster, but the driver shares memory with its ranks and "
                "engines; start the run on a machine of the cluster, with RAY_ADDRESS=auto"
            )
        options: dict[str, Any] = {"logging_level": "CRITICAL", "log_to_driver": False}
        if not address:
            options |= {
                "address": "local",  # else Ray would join whatever was started last on this machine
                "include_dashboard": False,
                "num_cpus": 1,  # workers that Ray starts in advance; the actors ask for none
                "num_gpus": num_gpus,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        os.environ[reaper.VARIABLE] = self.mark  # what Ray starts here inherits it
        try:
            self.ray.init(**options)
        except Exception as error:
            self._end_reaper()  # and with it what has started
            said = " ".join(str(error).split())[:600]
            refusal = (
                f"RAY_ADDRESS={address} cannot be joined: {said}"
                if address
                else f"Ray did not start here ({said}); if this machine is busy, end what else runs on it, or type the "
                "same command again"
            )
            if type(error) is Exception or isinstance(error, RuntimeError | OSError):  # Ray raises a bare one if late
                raise ValueError(refusal) from error
            raise
        finally:
            del os.environ[reaper.VARIABLE]

    def mark_on(self, node: Node) -> str:
        """Return the mark of the run's processes on a machine: another one on each, where a reaper looks for it."""
        return self.mark if node.id == self._here else f"{self.mark}.{node.id}"

    def environment(self, node: Node, **variables: str) -> dict[str, str]:
        """Return the variables of an actor's process: it carries the mark and finds the driver's modules."""
        root = str(Path(skyrl_train.__file__).parents[1])
        paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {
            reaper.VARIABLE: self.mark_on(node),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
            **variables,
        }

    def nodes(self, num_gpus: Sequence[int]) -> list[Node]:
        """Return a machine for each of these numbers of GPUs, the driver's first. ValueError if there are too few."""
        there = [node for node in self.ray.nodes() if node["Alive"]]
        there.sort(key=lambda node: (node["NodeID"] != self._here, node["NodeManagerAddress"], node["NodeID"]))
        chosen: list[Node] = []
        for wanted in num_gpus:
            fitting = next((node for node in there if node["Resources"].get("GPU", 0) >= wanted), None)
            if fitting is None or (not chosen and fitting["NodeID"] != self._here):
                raise ValueError(self._too_few(num_gpus))
            there.remove(fitting)
            chosen.append(Node(fitting["NodeID"], fitting["NodeManagerAddress"]))
        return chosen

    def _too_few(self, num_gpus: Sequence[int]) -> str:
        there = [node for node in self.ray.nodes() if node["Alive"]]
        gpus = [int(node["Resources"].get("GPU", 0)) for node in there]
        have = ", ".join(f"{node['NodeManagerAddress']} with {gpu} GPUs" for node, gpu in zip(there, gpus, strict=True))
        if len(num_gpus) == 1:
            return f"{num_gpus[0]} GPUs are needed, and Ray's cluster has {sum(gpus)}; use fewer"
        wanted = f" with {', '.join(map(str, num_gpus))} GPUs, the first of them this one" if any(num_gpus) else ""
        return (
            f"trainer.placement.policy_num_nodes={len(num_gpus)} needs {len(num_gpus)} machines{wanted}, and Ray's "
            f"cluster has {len(there)}: {have}; add machines with `ray start --address=...`, or use fewer"
        )

    def on(self, node: Node) -> Any:
        """Return the scheduling strategy of actors on a machine."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node.id, soft=False)

    def group(self, num_gpus: Sequence[int], nodes: Sequence[Node]) -> Any:
        """Return a placement group once it is ready: a bundle of so many GPUs on each machine. ValueError if not."""
        ray = self.ray
        bundles = [{"GPU": float(number)} for number in num_gpus]
        selectors = [{"ray.io/node-id": node.id} for node in nodes]
        group = ray.util.placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
        if not group.wait(GROUP_S):
            ray.util.remove_placement_group(group)
            free = ray.available_resources().get("GPU", 0)
            raise ValueError(
                f"{sum(num_gpus)} GPUs are needed ({', '.join(map(str, num_gpus))} on each machine), and Ray's cluster "
                f"had {free:.0f} free in {GROUP_S} s; end what holds them, or use fewer"
            )
        return group

    def close(self) -> None:
        """End Ray if it was started here, and every process of the run that is left."""
        if self._is_ours:
            self.ray.shutdown()
        self._end_reaper()

    def _end_reaper(self) -> None:
        """Let it end every process of the run that is left."""
        self._reaper.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._reaper.wait(REAPER_S)
