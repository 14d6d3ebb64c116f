"""A batch on its way to other processes: numpy arrays, which Ray maps into all of them without copying."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from skyrl_train.types import Batch

Arrays = dict[str, np.ndarray]


def arrays_of(batch: Batch) -> Arrays:
    """Return every tensor of the batch as an array on the host, by the name of its field."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items() if tensor is not None}


def batch_of(arrays: Arrays) -> Batch:
    """Return the batch. Its tensors are copies: what Ray maps must not be written to."""
    return Batch(**{name: torch.tensor(array) for name, array in arrays.items()})
