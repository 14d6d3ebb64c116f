"""The processes of a cluster: a learner rank, and an engine. Each builds its part and passes calls on to it.

Heavy imports live in the methods, so that a process says who it is before it loads torch.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_train.cluster.signs import Sign, cpu_seconds_of, place_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    from transformers import PreTrainedTokenizerBase

    from skyrl_train.cluster.start import Functions
    from skyrl_train.cluster.travel import Arrays
    from skyrl_train.engine.base import Completion, LoadingEngine, Request
    from skyrl_train.entrypoints.experiment import BasePPOExp
    from skyrl_train.learner.base import Learner
    from skyrl_train.weights.broadcast import Broadcast
    from skyrl_train.weights.shared_memory import SharedWeights

GROUP_TIMEOUT = timedelta(minutes=10)  # of a collective; watch.py finds out before what neither answers nor computes


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that answers calls: its number, the file that its output goes to, and the GPUs that it may use."""

    pid: int
    log: str | None
    gpus: str | None


def identity() -> Identity:
    try:
        log = os.readlink("/proc/self/fd/2")
    except OSError:
        log = None
    return Identity(os.getpid(), log, os.environ.get("CUDA_VISIBLE_DEVICES"))


class LearnerRank:
    """One of the processes that train the policy together. All get the same calls with the same arguments.

    Calls run one after the other in one thread; `sign` and `saved` answer beside them.
    """

    def __init__(self, rank: int, world_size: int, num_threads: int | None, functions: tuple[Functions, Functions]):
        self.rank, self.world_size = rank, world_size
        self._num_threads, self._functions = num_threads, functions
        self._learner: Learner | None = None
        self._tokens = (0, 0)
        self._thread: int | None = None  # the one that computes
        self._saving: Future[None] | None = None

    def identity(self) -> Identity:
        return identity()

    def gpu_ids(self) -> list[int]:
        """Return the GPUs that Ray has given to this process."""
        import ray

        return [int(gpu) for gpu in ray.get_gpu_ids()]

    def open_store(self, address: str) -> int:
        """Open the meeting point of the ranks at an address of this machine, and return its port."""
        from torch.distributed import TCPStore

        self._store = TCPStore(address, 0, self.world_size, is_master=True, wait_for_workers=False)
        return self._store.port

    def build(self, exp: BasePPOExp, address: str, port: int) -> None:
        """Join the other ranks, load the policy and make the learner."""
        import ray
        import torch
        from torch import distributed

        from skyrl_train.cluster.machine import meet_through
        from skyrl_train.cluster.start import register_all

        self._thread = threading.get_ident()
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        register_all(*self._functions)
        if address != "127.0.0.1":
            meet_through(ray.util.get_node_ip_address())
        if self.world_size > 1 or exp.cfg.trainer.strategy != "single":
            store = self._store if self.rank == 0 else distributed.TCPStore(address, port, self.world_size)
            backend = "cpu:gloo,cuda:nccl" if exp.device.type == "cuda" else "gloo"
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world_size, timeout=GROUP_TIMEOUT
            )
        self._learner = exp.get_learner(exp.get_policy())

    def add_logprobs(self, arrays: Arrays) -> Arrays | None:
        """Return what was added to the batch; only rank 0 does, for all ranks have the same."""
        from skyrl_train.cluster.travel import batch_of

        batch = self._built.add_logprobs(batch_of(arrays))
        added = {name: getattr(batch, name) for name in ("old_logprobs", "ref_logprobs", "values")}
        found = {name: tensor.cpu().numpy() for name, tensor in added.items() if tensor is not None}
        return found if self.rank == 0 else None

    def update(self, arrays: Arrays, is_imitation: bool = False) -> tuple[dict[str, float], int]:
        """Return metrics and policy version."""
        from skyrl_train.cluster.travel import batch_of

        self._tokens = (0, 0)
        call = self._built.imitate if is_imitation else self._built.update
        metrics = call(batch_of(arrays), self._reached)
        return metrics, self._built.policy_version

    def sign(self) -> Sign | None:
        """Return where the computation is. None before there is any."""
        if self._thread is None:
            return None
        is_writing = self._saving is not None and not self._saving.done()
        return Sign(place_of(self._thread), cpu_seconds_of(self._thread), self._tokens, is_writing)

    def update_reference(self) -> None:
        self._built.update_reference()

    def save(self, folder: Path) -> None:
        """Begin to write. `saved` answers when it is done."""
        self._saving = self._built.save(folder)

    def saved(self) -> None:
        """Return when the files are there, or raise why not. It answers beside the calls that come after `save`."""
        assert self._saving is not None, "save comes first"
        self._saving.result()

    def load(self, folder: Path) -> int:
        """Return the policy version."""
        self._built.load(folder)
        return self._built.policy_version

    def publish(self, path: Path) -> SharedWeights:
        """Write the weights to `path`, and give back the GPU memory that torch keeps: an engine that slept needs it."""
        import torch

        shared = self._built.publish(path)
        torch.cuda.empty_cache()  # does nothing without a GPU
        return shared

    def announce_weights(self, address: str, num_readers: int) -> Broadcast:
        """Announce the weights, and give back GPU memory as `publish` does."""
        import torch

        torch.cuda.empty_cache()
        return self._built.announce_weights(address, num_readers)

    def send_weights(self, broadcast: Broadcast, num_engines: int) -> list[str]:
        """Send the weights, and give back GPU memory: the engine takes that of its cache next."""
        import torch

        engines = self._built.send_weights(broadcast, num_engines)
        torch.cuda.empty_cache()
        return engines

    def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        return self._built.logprobs_of_tokens(ids)

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._built.save_pretrained(folder, tokenizer)

    def _reached(self, done: int, total: int) -> None:
        self._tokens = (done, total)

    @property
    def _built(self) -> Learner:
        assert self._learner is not None, "build comes first"
        return self._learner


class EngineActor:
    """A process around one LoadingEngine. `generate` is called for many requests at once."""

    def __init__(self, num_threads: int | None) -> None:
        self._num_threads = num_threads
        self._engine: LoadingEngine | None = None

    async def identity(self) -> Identity:
        return identity()

    async def build(self, exp: BasePPOExp) -> int:
        """Make the engine with weights of its own, and return its max_model_len."""
        if self._num_threads is not None:
            import torch

            torch.set_num_threads(self._num_threads)  # the compute thread takes it over
        self._engine = await exp.get_own_engine()
        return self._engine.max_model_len

    async def generate(self, request: Request) -> tuple[Completion, float]:
        """Return the completion, and the engine's busy seconds by now."""
        completion = await self._built.generate(request)
        return completion, self._built.busy_seconds

    async def busy_seconds(self) -> float:
        """Return how long the engine has computed for, beside the requests that are under way."""
        return self._built.busy_seconds

    async def pause(self) -> None:
        await self._built.pause()

    async def load_weights(self, weights: SharedWeights | Broadcast) -> None:
        await self._built.load_weights(weights)

    async def sleep(self) -> None:
        await self._built.sleep()

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        return await self._built.logprobs_of_tokens(ids)

    async def weights_changed(self, policy_version: int) -> None:
        await self._built.weights_changed(policy_version)

    async def resume(self) -> None:
        await self._built.resume()

    async def forget(self, session_id: str) -> None:
        await self._built.forget(session_id)

    async def close(self) -> None:
        await self._built.close()

    @property
    def _built(self) -> LoadingEngine:
        assert self._engine is not None, "build comes first"
        return self._engine
