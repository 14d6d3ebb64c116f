"""The learner as a protocol: a batch in, new weights out. The trainer knows nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_train.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnTokens = Callable[[int, int], None]  # (tokens done, tokens in all)


class Learner(Protocol):
    """Anything that trains the policy. Calls are made one after the other, in the compute thread."""

    @property
    def policy_version(self) -> int:
        """Optimizer steps so far."""
        ...

    def add_logprobs(self, batch: Batch) -> Batch:
        """Return the batch with `old_logprobs` and `ref_logprobs`, where the coming update needs them."""
        ...

    def update(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        """Train on a batch with advantages. Return SkyRL's metrics, `policy/...`."""
        ...

    def update_reference(self) -> None:
        """Make the policy as it is now the reference, if there is one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later updates depend on. The tensors are live: save them before the next update."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the learner of `state` stood. ValueError or KeyError if it is of another model or optimizer."""
        ...

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy in Hugging Face format, as the engine samples from it."""
        ...

    def close(self) -> None:
        """Free what only training needs. Nothing but `close` may be called afterwards."""
        ...
