"""Advantages, losses, KL and off-policy corrections: pure functions on flat tensors, each naming its paper."""

from skyrl_train.algorithms import (
    advantages,
    baselines,
    covariance_losses,
    losses,
    multi_reward,
)  # fills the registries
from skyrl_train.algorithms.registry import (
    AdvantageEstimatorRegistry,
    PolicyLossRegistry,
    register_advantage_estimator,
    register_policy_loss,
)

__all__ = [
    "AdvantageEstimatorRegistry",
    "PolicyLossRegistry",
    "advantages",
    "baselines",
    "covariance_losses",
    "losses",
    "multi_reward",
    "register_advantage_estimator",
    "register_policy_loss",
]
