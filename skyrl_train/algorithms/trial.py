"""A trial of a user's estimator on a small batch at start-up, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loguru import logger

from skyrl_train.algorithms.advantages import estimated
from skyrl_train.algorithms.registry import AdvantageEstimatorRegistry
from skyrl_train.algorithms.skyrl_style import is_ours, name_of
from skyrl_train.algorithms.trial_batch import trial_batch

if TYPE_CHECKING:
    from skyrl_train.config import AlgorithmConfig


def check_estimator(algorithm: AlgorithmConfig) -> None:
    """Call the configured estimator once, unless it is ours. Raises what it raises; warns if it returns only zeros."""
    function = AdvantageEstimatorRegistry.get(algorithm.advantage_estimator)
    if is_ours(function):
        return
    batch = trial_batch()
    try:
        advantages, _ = estimated(batch, algorithm)
    except Exception as error:
        error.add_note(f"while the advantage estimator {name_of(function)} was tried on a batch of 4 trajectories")
        raise
    if not advantages[batch.loss_mask].isfinite().all():
        raise ValueError(
            f"the advantage estimator {name_of(function)} returned advantages that are not finite for 4 trajectories "
            "of 2 prompts with rewards 1, 0, 0.5, 1: an update with them is left out; a divisor may be 0"
        )
    if not advantages[batch.loss_mask].any():
        logger.warning(
            f"the advantage estimator {name_of(function)} returned zeros alone for 4 trajectories of 2 prompts with "
            "rewards 1, 0, 0.5, 1: with advantages of 0 nothing is learned"
        )
