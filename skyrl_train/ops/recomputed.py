"""Tensors that cost little to make and much to keep: what an operation saves of them is made again in backward."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recomputed:
    """Stands for a tensor in all operations that save it. It is made when the first of them asks, once for all."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make, self._num_users = make, 0
        self._made: Tensor | None = None

    def saved(self) -> Recomputed:
        self._num_users += 1
        return self

    def tensor(self) -> Tensor:
        """Return the tensor, and keep it for the other users only."""
        made = self._make() if self._made is None else self._made
        self._num_users -= 1
        self._made = made if self._num_users > 0 else None
        return made


@contextmanager
def recomputed(tensor: Tensor, make: Callable[[], Tensor]) -> Generator[None]:
    """Let operations in this context save a recipe where they would save `tensor`.

    make: returns it again, without a gradient, from what other operations keep anyway. The memory of `tensor` is free
    as soon as nobody else holds it (Chen et al., 2016, arXiv 1604.06174, section 3, for single operations).
    """
    if not torch.is_grad_enabled():
        yield
        return
    recipe = Recomputed(torch.no_grad()(make))
    storage, geometry = tensor.untyped_storage()._cdata, (tensor.shape, tensor.stride())

    def save(kept: Tensor) -> Tensor | Recomputed:
        is_it = kept.untyped_storage()._cdata == storage and (kept.shape, kept.stride()) == geometry
        return recipe.saved() if is_it else kept

    def load(kept: Tensor | Recomputed) -> Tensor:
        return kept.tensor() if isinstance(kept, Recomputed) else kept

    with saved_tensors_hooks(save, load):
        yield
