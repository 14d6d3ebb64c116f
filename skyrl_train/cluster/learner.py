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

    from skyrl_train.entrypoints.experiment import BasePPOExp
    from skyrl_train.weights.shared_memory import SharedWeights

LOOK_S = 0.5  # between two looks at the progress of an update
DEATH_S = 5.0  # for the news of a death, which may come after the errors that it gives the other ranks


class RayLearner:
    """Passes every call to all ranks, and returns what rank 0 answers. A rank that dies ends the call: LearnerDied."""

    def __init__(
        self,
        ranks: Sequence[Any],
        identities: Sequence[Identity | None] | None = None,
        *,
        silent_s: float = SILENT_S,
        stuck_s: float = STUCK_S,
    ) -> None:
        """ranks: handles of LearnerRank actors. `identify` and `build` come first. silent_s, stuck_s: see watch.py."""
        self._ray = import_ray()
        self._ranks = list(ranks)
        self._identities: list[Identity | None] = list(identities or [None] * len(ranks))
        self._silent_s, self._stuck_s = silent_s, stuck_s
        self._policy_version = 0
        self._saving = ThreadPoolExecutor(1, "checkpoint")
        self._is_closed = False

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def num_ranks(self) -> int:
        return len(self._ranks)

    def identify(self) -> None:
        """Wait until every process runs, and note who it is, for the message if it dies."""
        self._identities = self.answers([rank.identity.remote() for rank in self._ranks], starts=True)

    def build(self, exp: BasePPOExp) -> None:
        """Let the ranks meet, load the policy and make their learners. LearnerDied, or what one of them raised."""
        port = self.answers([self._ranks[0].open_store.remote()], starts=True)[0]
        reference = self._ray.put(exp)
        self.answers([rank.build.remote(reference, port) for rank in self._ranks], starts=True)

    def add_logprobs(self, batch: Batch) -> Batch:
        arrays = self._ray.put(arrays_of(batch))
        found = self.answers([rank.add_logprobs.remote(arrays) for rank in self._ranks])[0]
        return replace(batch, **{name: torch.tensor(array) for name, array in found.items()})

    def update(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        arrays = self._ray.put(arrays_of(batch))
        calls = [rank.update.remote(arrays) for rank in self._ranks]
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
                found[call] = self._result(calls, call)
            watch.look([calls.index(call) for call in waiting])
            if on_tokens is not None and (sign := watch.signs.get(0)) is not None and sign.tokens[1]:
                on_tokens(*sign.tokens)
        return [found[call] for call in calls]

    def _result(self, calls: Sequence[Any], call: Any) -> Any:
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            rank = calls.index(call)
            name = f"learner rank {rank} of {self.num_ranks}"
            raise LearnerDied(obituary(name, self._identities[rank], error)) from None
        except self._ray.exceptions.RayTaskError as error:
            if type(cause := cause_of(error)) is RuntimeError:
                self._raise_death([other for other in calls if other is not call], calls)
            raise cause from error

    def _raise_death(self, others: Sequence[Any], calls: Sequence[Any]) -> None:
        """Raise LearnerDied if a rank has died: the others see of it that a connection was closed."""
        died = self._ray.exceptions.RayActorError
        deadline = time.monotonic() + DEATH_S
        while others and (left_s := deadline - time.monotonic()) > 0:
            done, others = self._ray.wait(list(others), num_returns=1, timeout=left_s)
            for other in done:
                try:
                    self._ray.get(other)
                except died:
                    self._result(calls, other)
                except self._ray.exceptions.RayTaskError:
                    continue
