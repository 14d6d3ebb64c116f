"""User functions come in by name or by import path and get only what they ask for."""

import pytest

from skyrl_train.algorithms.losses import clipped_surrogate
from skyrl_train.algorithms.registry import (
    AdvantageEstimatorRegistry,
    PolicyLossRegistry,
    call_with_named,
    register_advantage_estimator,
    register_policy_loss,
)


def mine(log_probs, scale=2):
    return log_probs * scale


def test_the_built_in_names_are_there():
    assert set(PolicyLossRegistry.list_available()) == {
        "regular", "dual_clip", "gspo", "cispo", "clip_cov", "kl_cov", "sapo", "cross_entropy", "importance_sampling",
        "dppo", "gmpo", "rollout_is",
    }  # fmt: skip
    assert AdvantageEstimatorRegistry.list_available() == [
        "distillation",
        "gae",
        "gdpo",
        "gpg",
        "grpo",
        "maxrl",
        "opo",
        "pass_at_k",
        "reinforce++",
        "rloo",
    ]
    assert PolicyLossRegistry.get("regular") is clipped_surrogate


@pytest.mark.parametrize(
    ("registry", "register"),
    [(PolicyLossRegistry, register_policy_loss), (AdvantageEstimatorRegistry, register_advantage_estimator)],
)
def test_register_get_unregister(registry, register):
    register("mine")(mine)
    try:
        assert registry.get("mine") is mine
        with pytest.raises(ValueError, match="already registered"):
            register("mine")(mine)
    finally:
        registry.unregister("mine")
    with pytest.raises(ValueError, match="not registered"):
        registry.unregister("mine")
    with pytest.raises(ValueError, match=r"Unknown .*'mine'.*(regular|grpo)"):
        registry.get("mine")


def test_an_import_path_is_a_name():
    assert PolicyLossRegistry.get(f"{__name__}:mine") is mine


def test_a_function_gets_only_the_parameters_it_takes():
    assert call_with_named(mine, {"log_probs": 3, "rollout_logprobs": 9}) == 6
    assert call_with_named(lambda **everything: everything, {"a": 1, "b": 2}) == {"a": 1, "b": 2}


def test_a_parameter_that_nobody_offers_is_named():
    with pytest.raises(ValueError, match=r"mine needs log_probs.*Offered: a, b"):
        call_with_named(mine, {"a": 1, "b": 2})
