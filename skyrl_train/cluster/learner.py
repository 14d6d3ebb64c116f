"""The learner whose ranks are actors: the trainer calls it as it calls the learner in its own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train.cluster.actors import Identity
from skyrl_train.cluster.deaths import cause_of, obituary
from skyrl_train.cluster.start import import_ray
from skyrl_train.cluster.travel import arrays_of
from skyrl_train.cluster.watch import SILENT_S, START_S, STUCK_S, Watch
from skyrl_train.learner.base import LearnerDied, OnTokens
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.cluster.session import Node
    from skyrl_train.entrypoints.experiment import BasePPOExp
    from skyrl_train.weights.broadcast import Broadcast
    from skyrl_train.weights.shared_memory import SharedWeights

DEATH_S = 8.0  # for a death that explains why another rank lost its connection
LOOK_S = 0.5  # between two looks at the progress of an update


class RayLearner:
    """Passes every call to all ranks, and returns what rank 0 answers. A rank that dies ends the call: LearnerDied."""

    def __init__(
        self, ranks: Sequence[Any], nodes: Sequence[Node], *, silent_s: float = SILENT_S, stuck_s: float = STUCK_S
    ) -> None:
        """ranks: handles of LearnerRank actors, on these machines. silent_s, stuck_s: see watch.py.

        `identify` and `build` come first.
        """
        self._ray = import_ray()
        self._ranks, self._nodes = list(ranks), list(nodes)
        self._identities: list[Identity | None] = [None] * len(self._ranks)
        self._silent_s, self._stuck_s = silent_s, stuck_s
        self._policy_version = 0
        self._saving = ThreadPoolExecutor(1, "checkpoint")
        self._is_closed = False

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def _has_machines(self) -> bool:
        return len(set(self._nodes)) > 1

    @property
    def _address(self) -> str:
        return self._nodes[0].address if self._has_machines else "127.0.0.1"

    @property
    def num_ranks(self) -> int:
        return len(self._ranks)

    def identify(self) -> None:
        """Wait until every process runs, and note who it is, for the message if it dies."""
        self._identities = self.answers([rank.identity.remote() for rank in self._ranks], starts=True)

    def build(self, exp: BasePPOExp) -> None:
        """Let the ranks meet, load the policy and make their learners. LearnerDied, or what one of them raised."""
        address = self._address
        port = self.answers([self._ranks[0].open_store.remote(address)], starts=True)[0]
        reference = self._ray.put(exp)
        self.answers([rank.build.remote(reference, address, port) for rank in self._ranks], starts=True)

    def add_logprobs(self, batch: Batch) -> Batch:
        arrays = self._ray.put(arrays_of(batch))
        found = self.answers([rank.add_logprobs.remote(arrays) for rank in self._ranks])[0]
        return replace(batch, **{name: torch.tensor(array) for name, array in found.items()})

    def update(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        return self._trained(batch, on_tokens, is_imitation=False)

    def imitate(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        return self._trained(batch, on_tokens, is_imitation=True)

    def _trained(self, batch: Batch, on_tokens: OnTokens | None, *, is_imitation: bool) -> dict[str, float]:
        arrays = self._ray.put(arrays_of(batch))
        calls = [rank.update.remote(arrays, is_imitation) for rank in self._ranks]
        metrics, self._policy_version = self.answers(calls, on_tokens)[0]
        return metrics

    def update_reference(self) -> None:
        self.answers([rank.update_reference.remote() for rank in self._ranks])

    def save(self, folder: Path) -> Future[None]:
        """Let every rank begin to write its part into the folder. The future is done when all of them are."""
        self.answers([rank.save.remote(folder) for rank in self._ranks])
        return self._saving.submit(self._saved)

    def _saved(self) -> None:
        self.answers([rank.saved.options(concurrency_group="saving").remote() for rank in self._ranks])

    def load(self, folder: Path) -> None:
        self._policy_version = self.answers([rank.load.remote(folder) for rank in self._ranks])[0]

    def publish(self, path: Path) -> SharedWeights:
        return self.answers([rank.publish.remote(path) for rank in self._ranks])[0]

    def announce_weights(self, address: str | None = None, num_readers: int = 0) -> Broadcast:
        address = address or self._address
        return self.answers([rank.announce_weights.remote(address, num_readers) for rank in self._ranks])[0]

    def send_weights(self, broadcast: Broadcast, num_engines: int) -> list[str]:
        return self.answers([rank.send_weights.remote(broadcast, num_engines) for rank in self._ranks])[0]

    def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        return self.answers([rank.logprobs_of_tokens.remote(ids) for rank in self._ranks])[0]

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.answers([rank.save_pretrained.remote(folder, tokenizer) for rank in self._ranks])

    def close(self) -> None:
        """End the ranks, also in the middle of a call, which then raises LearnerDied in its own thread."""
        ranks = [] if self._is_closed else self._ranks
        self._is_closed = True
        for rank in ranks:
            self._ray.kill(rank)
        self._saving.shutdown()  # it has ended, and asks Ray no more

    def answers(self, calls: Sequence[Any], on_tokens: OnTokens | None = None, *, starts: bool = False) -> list[Any]:
        """Return the results in the order of the ranks. The first error is raised: the other ranks wait for that one.

        An error that a rank raised is raised as it is; one that died or hangs gives LearnerDied. starts: the call may
        be silent for as long as starting a process and importing takes.
        """
        found: dict[Any, Any] = {}
        waiting = list(calls)
        silent_s, stuck_s = (START_S, START_S) if starts else (self._silent_s, self._stuck_s)
        watch = Watch(self._ray, self._ranks, self._identities, silent_s, stuck_s)
        while waiting:
            if self._is_closed:  # and Ray may have ended, which would start again when it is asked for anything
                raise LearnerDied("the learner was closed")
            done, waiting = self._ray.wait(waiting, num_returns=1, timeout=LOOK_S)
            for call in done:
                found[call] = self._result_of(calls.index(call), call, calls, waiting)
            watch.look([calls.index(call) for call in waiting])
            if on_tokens is not None and (sign := watch.signs.get(0)) is not None and sign.tokens[1]:
                on_tokens(*sign.tokens)
        return [found[call] for call in calls]

    def _result_of(self, rank: int, call: Any, calls: Sequence[Any], waiting: list[Any]) -> Any:
        """Return a rank's answer. Where it lost the connection to another rank, that one's death is what is raised."""
        try:
            return self._result(rank, call)
        except LearnerDied:
            raise
        except RuntimeError:
            deadline = time.monotonic() + DEATH_S  # Ray learns of a lost machine later than the other ranks
            while waiting and not self._is_closed and time.monotonic() < deadline:
                done, waiting = self._ray.wait(waiting, num_returns=1, timeout=LOOK_S)
                for other in done:
                    self._raise_if_dead(calls.index(other), other)
            raise

    def _raise_if_dead(self, rank: int, call: Any) -> None:
        """Raise LearnerDied if that is why a rank did not answer. An error of its own comes after the first one's."""
        try:
            self._ray.get(call)
        except self._ray.exceptions.RayActorError:
            self._result(rank, call)
        except self._ray.exceptions.RayTaskError:  # an error of its own: the first one's is raised
            return

    def _result(self, rank: int, call: Any) -> Any:
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            name = f"learner rank {rank} of {self.num_ranks}"
            name += f" on {self._nodes[rank].name}" if self._has_machines else ""
            raise LearnerDied(obituary(name, self._identities[rank], error)) from None
        except self._ray.exceptions.RayTaskError as error:
            raise cause_of(error) from error
