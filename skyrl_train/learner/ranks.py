"""The processes that train one policy together, as one of them sees them. One process is ranks of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.lora_files import save_merged
from skyrl_train.policy.model import Policy
from skyrl_train.policy.value_head import Critic, batch_values
from skyrl_train.types import Batch

T = TypeVar("T")
Forward = Callable[..., tuple[Tensor, Tensor]]  # batch_logprobs of a policy
Values = Callable[[Batch], Tensor]  # batch_values of a critic


class Ranks:
    """The only rank there is: every sum is its own, and it holds every weight whole. fsdp.py has the ranks of many."""

    rank = 0
    size = 1

    def forward(self, policy: Policy) -> Forward:
        """Return `batch_logprobs` of this policy."""
        return partial(batch_logprobs, policy)

    def values_of(self, critic: Critic) -> Values:
        """Return `batch_values` of this critic."""
        return partial(batch_values, critic, critic.head, learns_trunk=critic.owns_trunk)

    def local(self, tensor: Tensor) -> Tensor:
        """Return the rows that this rank holds of a weight or of its gradient: here all of them.

        TypeError for a weight that is not sharded over these ranks.
        """
        if hasattr(tensor, "to_local"):
            raise TypeError("the weights are sharded, but this learner is of one process: use sharded_learner")
        return tensor

    def computed(self, parameter: Tensor) -> Tensor:
        """Return the rows that this rank holds, as the policy computes with them: rounded to its type."""
        return self.local(parameter).detach()

    def whole(self, parameter: Tensor) -> Tensor:
        """Return all rows, as the policy computes with them. Every rank must ask for the same parameter."""
        return self.computed(parameter)

    def save_merged(self, policy: Policy, folder: Path) -> None:
        """Write the policy in Hugging Face format, adapters merged."""
        save_merged(policy.module, folder)

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, all of one shape, on the host."""
        return numbers

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        return [value]


ONE_PROCESS = Ranks()


def rows_of(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return (first, stop): the rows of a tensor that a rank holds. It is torch.chunk's rule, and so FSDP2's."""
    step = -(-num_rows // size)
    return min(rank * step, num_rows), min((rank + 1) * step, num_rows)
