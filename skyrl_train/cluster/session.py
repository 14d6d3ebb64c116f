"""Ray for the length of a run: joined where RAY_ADDRESS names a cluster, else started here and ended with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import skyrl_train
from skyrl_train.cluster import reaper
from skyrl_train.cluster.start import import_ray

OBJECT_STORE_BYTES = 512 * 2**20  # batches alone travel through it: 32 MB for a million tokens
GROUP_S = 60  # for the GPUs of the run to become free
REAPER_S = 12


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
        finally:
            del os.environ[reaper.VARIABLE]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the variables of an actor's process: it carries the mark and finds the driver's modules."""
        root = str(Path(skyrl_train.__file__).parents[1])
        paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {
            reaper.VARIABLE: self.mark,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
            **variables,
        }

    def here(self) -> Any:
        """Return the scheduling strategy of actors on the driver's machine, whose memory brings them new weights."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)

    def group(self, bundles: list[dict[str, float]]) -> Any:
        """Return a placement group on the driver's machine, once it is ready. ValueError if it does not fit."""
        ray = self.ray
        needed, there = sum(bundle.get("GPU", 0) for bundle in bundles), ray.cluster_resources().get("GPU", 0)
        if needed > there:
            raise ValueError(f"{needed:.0f} GPUs are needed, and Ray's cluster has {there:.0f}; use fewer")
        bundles = [bundles[0] | {f"node:{ray.util.get_node_ip_address()}": 0.001}, *bundles[1:]]
        group = ray.util.placement_group(bundles, strategy="STRICT_PACK")
        if not group.wait(GROUP_S):
            free = ray.available_resources().get("GPU", 0)
            raise ValueError(
                f"{needed:.0f} GPUs of this machine are needed, and Ray's cluster had {free:.0f} free in {GROUP_S} s "
                f"(of {there:.0f}); end what holds them, or use fewer"
            )
        return group

    def close(self) -> None:
        """End Ray if it was started here, and every process of the run that is left."""
        if self._is_ours:
            self.ray.shutdown()
        self._reaper.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._reaper.wait(REAPER_S)
