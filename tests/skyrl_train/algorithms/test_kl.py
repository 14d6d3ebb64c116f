"""KL estimators, their gradient, and the controllers. d = -1 is a policy less sure than the reference, d = 2 surer."""

import math
from dataclasses import replace

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from skyrl_train.algorithms.kl import KLController, kl_controller, kl_metrics, token_kl, with_kl_in_rewards
from skyrl_train.batch.packing import pack
from skyrl_train.config import AlgorithmConfig
from skyrl_train.config.algorithm import KLCtrlConfig
from tests.skyrl_train.batches import sample

EXPECTED = {
    "k1": [-1.0, 2.0],
    "abs": [1.0, 2.0],
    "k2": [0.5, 2.0],
    "k3": [math.e - 2.0, math.exp(-2.0) + 1.0],
}
GRADIENTS = {"k1": [1.0, 1.0], "abs": [-1.0, 1.0], "k2": [-1.0, 2.0], "k3": [1.0 - math.e, 1.0 - math.exp(-2.0)]}


@pytest.mark.parametrize("estimator", EXPECTED)
def test_value_and_gradient(estimator):
    logprobs = tensor([-3.0, -1.0, -9.0], requires_grad=True)
    kl = token_kl(logprobs, tensor([-2.0, -3.0, 0.0]), tensor([True, True, False]), estimator)
    assert_close(kl, tensor([*EXPECTED[estimator], 0.0]))
    [gradient] = torch.autograd.grad(kl.sum(), logprobs)
    assert_close(gradient, tensor([*GRADIENTS[estimator], 0.0]))


def test_k3_is_bounded():
    kl = token_kl(tensor([-100.0, 0.0]), tensor([0.0, -100.0]), tensor([True, True]), "k3")
    assert kl.tolist() == [10.0, 10.0]


def test_an_unknown_estimator_names_the_known_ones():
    with pytest.raises(ValueError, match="k1, k2, k3, abs"):
        token_kl(tensor([0.0]), tensor([0.0]), tensor([True]), "k4")


def test_kl_in_the_reward_is_paid_by_trained_tokens_only():
    batch = pack([sample("011", [0, 0, 1.0]), sample("01", [0, 0.0], trajectory="a_1")])
    batch = replace(batch, old_logprobs=tensor([0, -1.0, -1, 0, -2]), ref_logprobs=tensor([-9.0, -3, -1, -9, -1]))
    # d = 2, 0 | -1
    assert_close(with_kl_in_rewards(batch, 0.1, "k1").rewards, tensor([0, -0.2, 1.0, 0, 0.1]))
    assert kl_metrics(batch, 0.1, "k1") == {  # episodes: (2 + 0) / 2 and -1
        "loss/avg_kl": 0.0,
        "loss/avg_kl_max": 2.0,
        "loss/kl_loss_coef": 0.1,
    }


def test_kl_in_the_reward_without_logprobs_says_what_to_do():
    with pytest.raises(ValueError, match="add_logprobs"):
        with_kl_in_rewards(pack([sample("01")]), 0.1, "k1")


def test_the_fixed_controller_stays():
    controller = KLController(0.1)
    controller.update(kl=100.0, num_samples=10)
    assert controller.coefficient == 0.1


@pytest.mark.parametrize(("kl", "factor"), [(0.11, 1.001), (5.0, 1.002), (0.0, 0.998)])
def test_the_adaptive_controller_follows_its_target_within_a_fifth(kl, factor):
    controller = KLController(0.5, target=0.1, horizon=1000.0)
    controller.update(kl, num_samples=10)
    assert controller.coefficient == pytest.approx(0.5 * factor)
    restored = KLController(0.5, target=0.1)
    restored.load_state_dict(controller.state_dict())
    assert restored.coefficient == controller.coefficient


def test_the_controller_comes_from_the_configuration():
    assert kl_controller(AlgorithmConfig(kl_loss_coef=0.3)) == KLController(0.3)
    adaptive = AlgorithmConfig(kl_loss_coef=0.3, kl_ctrl=KLCtrlConfig(type="adaptive", kl_target=0.2, horizon=50))
    assert kl_controller(adaptive) == KLController(0.3, target=0.2, horizon=50)
