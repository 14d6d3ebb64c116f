"""A trial of a user's functions on a small batch at start-up, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from loguru import logger

from skyrl_gym.contract import Outcome
from skyrl_train.algorithms.advantages import estimated
from skyrl_train.algorithms.registry import AdvantageEstimatorRegistry
from skyrl_train.algorithms.skyrl_style import is_ours
from skyrl_train.algorithms.trial_batch import trial_batch
from skyrl_train.users_functions import WrongFunction, name_of
from skyrl_train.visible import words_of

if TYPE_CHECKING:
    from skyrl_train.config import AlgorithmConfig

T = TypeVar("T")


def tried(what: str, call: Callable[[], T]) -> T:
    """Return what the call returns. WrongFunction, with the error of `what` and its place, if it raises."""
    outcome = Outcome.of(call)
    if outcome.error is None:
        return outcome.value
    if isinstance(outcome.error, WrongFunction | KeyboardInterrupt):
        raise outcome.error
    raise WrongFunction(f"{what} fails on a small batch: {words_of(outcome.error)}") from outcome.error


def check_estimator(algorithm: AlgorithmConfig) -> None:
    """Call the configured estimator once, unless it is ours. WrongFunction if it fails; warns of nothing but zeros."""
    function = AdvantageEstimatorRegistry.get(algorithm.advantage_estimator)
    if is_ours(function):
        return
    what = f"the advantage estimator {name_of(function)}"
    batch = trial_batch()
    advantages, _ = tried(what, lambda: estimated(batch, algorithm))
    if not advantages[batch.loss_mask].isfinite().all():
        raise WrongFunction(
            f"{what} returned advantages that are not finite for 4 trajectories of 2 prompts with rewards 1, 0, 0.5, "
            "1: an update with them is left out; a divisor may be 0"
        )
    if not advantages[batch.loss_mask].any():
        logger.warning(
            f"{what} returned zeros alone for 4 trajectories of 2 prompts with rewards 1, 0, 0.5, 1: with advantages "
            "of 0 nothing is learned"
        )
