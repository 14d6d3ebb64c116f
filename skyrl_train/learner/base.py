"""The learner as a protocol: a batch in, new weights out. The trainer knows nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from skyrl_train.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.weights.broadcast import Broadcast
    from skyrl_train.weights.shared_memory import SharedWeights

OnTokens = Callable[[int, int], None]  # (tokens done, tokens in all)


class LearnerDied(RuntimeError):
    """A process of the learner has died. The message names it, and says why. The run ends, and can be resumed."""


class Learner(Protocol):
    """Anything that trains the policy. Calls are made one after the other, in the compute thread.

    A policy may be sharded over several processes, its ranks. Each holds a learner, each learner gets the same calls
    with the same arguments, and each returns the same: a call is finished when it is on all of them.
    """

    @property
    def policy_version(self) -> int:
        """Optimizer steps so far."""
        ...

    def add_logprobs(self, batch: Batch) -> Batch:
        """Return the batch with `old_logprobs`, `ref_logprobs` and `values`, where the coming update needs them."""
        ...

    def update(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        """Train on a batch with advantages. Return SkyRL's metrics, `policy/...` and `critic/...`."""
        ...

    def imitate(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        """Make one optimizer step of cross entropy on the batch's trained tokens. Return metrics, `sft/...`."""
        ...

    def update_reference(self) -> None:
        """Make the policy as it is now the reference, if there is one."""
        ...

    def save(self, folder: Path) -> Future[None]:
        """Begin to write everything that later updates depend on into files of `folder`. Each rank writes its own.

        The future is done when the files are there, and holds the error if one was not written. They hold the state of
        this moment: a later call that would change it waits until they are written.
        """
        ...

    def load(self, folder: Path) -> None:
        """Go on where the learner stood that wrote `folder`, on however many ranks.

        ValueError if it is of another model or optimizer.
        """
        ...

    def publish(self, path: Path) -> SharedWeights:
        """Write the numbers that the policy computes with into the file `path`, for engines of other processes.

        Names are those of Hugging Face's format, adapters are added in, and a tied head comes once. Rank 0 writes.
        """
        ...

    def announce_weights(self, address: str = "127.0.0.1", num_readers: int = 0) -> Broadcast:
        """Say what `send_weights` will send, and where engines meet it: at an address of rank 0's machine.

        num_readers: workers of engines on each device of a rank, which copy out of its buffers; 0: nobody shares one.
        """
        ...

    def send_weights(self, broadcast: Broadcast, num_engines: int) -> list[str]:
        """Send the numbers that `publish` would write to the engines that meet. Return those that took all of them.

        RuntimeError if none did. The engines receive meanwhile; none is waited for long (weights/broadcast.py, ipc.py).
        """
        ...

    def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        """Return the logprobs of ids[1:], each after the ids before it, at temperature 1.

        An engine that holds the same weights finds the same, which proves a push.
        """
        ...

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy in Hugging Face format, as the engine samples from it."""
        ...

    def close(self) -> None:
        """Free what only training needs. Nothing but `close` may be called afterwards."""
        ...
