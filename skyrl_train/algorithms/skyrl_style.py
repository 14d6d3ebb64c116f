"""Functions written for SkyRL: they name its parameters, so they get its padded shapes; what they return is put back.

An estimator or a loss that names one of our flat tensors (`FLAT_NAMES`) gets ours; so does every function of this
package. Any other function from outside is SkyRL's: `token_level_rewards`, `response_mask` and `index` exist only
padded, and a loss may look at its rows, which `dim=-1` of a flat tensor would mix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl_train.algorithms.padded import trajectory_rows
from skyrl_train.algorithms.registry import Function, call_with_named
from skyrl_train.types import Batch
from skyrl_train.users_functions import WrongFunction, name_of, parameters_of

FLAT_NAMES = {"batch", "rewards", "sample_index", "group_index", "trajectory_index"}
PADDED_NAMES = {"token_level_rewards", "response_mask", "index"}
OUR_PACKAGE = "skyrl_train.algorithms."


def is_skyrl_style(function: Function) -> bool:
    """Return whether the function is called with padded tensors. WrongFunction for one that mixes both vocabularies."""
    named = {parameter.name for parameter in parameters_of(function, name_of(function))}
    if named & FLAT_NAMES and named & PADDED_NAMES:
        raise WrongFunction(
            f"{name_of(function)} names {', '.join(sorted(named & FLAT_NAMES))} of ours, which are flat, and "
            f"{', '.join(sorted(named & PADDED_NAMES))} of SkyRL's, which are padded; take one kind: "
            f"{', '.join(sorted(FLAT_NAMES))} and loss_mask, or {', '.join(sorted(PADDED_NAMES))}"
        )
    return not named & FLAT_NAMES and not is_ours(function)


def is_ours(function: Function) -> bool:
    """Return whether the function is one of this package."""
    return (getattr(function, "__module__", None) or "").startswith(OUR_PACKAGE)


def call_estimator(function: Function, batch: Batch, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), both [T], of an estimator in SkyRL's style.

    Its rows are trajectories, so that the sum of a row is the score of an episode, and `index` names the prompt of
    each: a trajectory that became several samples is one row.
    """
    rows = trajectory_rows(batch)
    answer = call_with_named(
        function,
        {
            "token_level_rewards": rows.pad(batch.rewards),
            "response_mask": rows.response_mask,
            "index": _prompts_of_trajectories(batch),
            **settings,
            "values": None if batch.values is None else rows.pad(batch.values),
        },
    )
    advantages, returns = checked_pair(answer, function, rows.shape, "trajectories, response tokens")
    return rows.unpad(advantages.float()), rows.unpad(returns.float())


def checked_pair(answer: Any, function: Function, shape: tuple[int, ...], axes: str) -> tuple[Tensor, Tensor]:
    """Return what an estimator returned as tensors. WrongFunction unless it is two of this shape."""
    is_pair = isinstance(answer, tuple | list) and len(answer) == 2
    if is_pair:
        answer = tuple(_as_tensor(part) for part in answer)
    if not is_pair or not all(_has_shape(part, shape) for part in answer):
        raise WrongFunction(
            f"the advantage estimator {name_of(function)} returned {kind_of(answer)}; it must return (advantages, "
            f"returns), both {list(shape)} ({axes})"
        )
    advantages, returns = answer
    return advantages.detach(), returns.detach()  # micro batches share them, and a graph is walked backward once


def _has_shape(part: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(part, Tensor) and tuple(part.shape) == shape and not part.is_complex()


def _as_tensor(part: Any) -> Any:
    """Return an array or a list of numbers as a tensor, and anything else as it is."""
    if not isinstance(part, np.ndarray | list | tuple):
        return part
    try:
        return torch.as_tensor(np.asarray(part))
    except (TypeError, ValueError, RuntimeError):  # texts, rows of several lengths
        return part


def kind_of(answer: Any) -> str:
    """Return the types and shapes of what a function returned, in words."""
    if isinstance(answer, Tensor):
        return f"a tensor {list(answer.shape)}"
    if isinstance(answer, tuple | list):
        return "(" + ", ".join(kind_of(part) for part in answer) + ")"
    return type(answer).__name__


def _prompts_of_trajectories(batch: Batch) -> np.ndarray:
    """Return [trajectories] the number of each trajectory's prompt as str, like SkyRL's uids."""
    trajectories, row_of_sample = batch.trajectory_index.unique(return_inverse=True)
    groups = torch.zeros_like(trajectories).scatter(0, row_of_sample, batch.group_index)
    return np.array([str(group) for group in groups.tolist()], dtype=object)
