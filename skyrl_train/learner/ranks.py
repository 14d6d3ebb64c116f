"""The processes that train one policy together, as one of them sees them. One process is ranks of one."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The only rank there is: every sum is its own, and it holds every weight whole. fsdp.py has the ranks of many."""

    rank = 0
    size = 1

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this rank holds of a weight or of its gradient: here all of it.

        TypeError for a weight that is not spread over ranks as these are.
        """
        if hasattr(tensor, "to_local"):
            raise TypeError("the weights are sharded, but this learner is of one process: use sharded_learner")
        return tensor

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
