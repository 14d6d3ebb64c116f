"""Losses per token, with numbers that can be checked by hand: low = high = 0.2 throughout, ln 2 = 0.693."""

import math
from typing import Any

import pytest
import torch
from torch import tensor, zeros
from torch.testing import assert_close

from skyrl_train.algorithms.covariance_losses import clip_cov, kl_cov
from skyrl_train.algorithms.losses import (
    cispo,
    clipped_surrogate,
    cross_entropy,
    dppo,
    dual_clip,
    gmpo,
    gspo,
    importance_sampling,
    rollout_is,
    sapo,
)

CLIP = {"eps_clip_low": 0.2, "eps_clip_high": 0.2}
ALL = tensor([True, True])


def gradient_of(loss_function, log_probs, **arguments):
    leaf = log_probs.clone().requires_grad_()
    loss, _ = loss_function(log_probs=leaf, **arguments)
    return torch.autograd.grad(loss.sum(), leaf)[0]


def test_clip_stops_the_gain_but_not_the_penalty():
    ratio, advantages = tensor([2.0, 2.0]), tensor([1.0, -1.0])
    loss, metrics = clipped_surrogate(ratio.log(), zeros(2), advantages, ALL, **CLIP)
    # +1: min(2.0, 1.2) = 1.2 -> -1.2;   -1: min(-2.0, -1.2) = -2.0 -> +2.0
    assert_close(loss, tensor([-1.2, 2.0]))
    assert metrics == {"clip_ratio": 0.5}
    gradient = gradient_of(
        clipped_surrogate, ratio.log(), old_log_probs=zeros(2), advantages=advantages, loss_mask=ALL, **CLIP
    )
    assert_close(gradient, tensor([0.0, 2.0]))


def test_clip_below_stops_the_penalty_but_not_the_gain():
    loss, metrics = clipped_surrogate(tensor([0.5, 0.5]).log(), zeros(2), tensor([1.0, -1.0]), ALL, **CLIP)
    # +1: min(0.5, 0.8) = 0.5 -> -0.5;   -1: min(-0.5, -0.8) = -0.8 -> +0.8
    assert_close(loss, tensor([-0.5, 0.8]))
    assert metrics == {"clip_ratio": 0.5}


def test_clip_higher_moves_the_upper_bound_only():
    loss, _ = clipped_surrogate(
        tensor([2.0, 0.5]).log(), zeros(2), tensor([1.0, -1.0]), ALL, eps_clip_low=0.2, eps_clip_high=0.28
    )
    assert_close(loss, tensor([-1.28, 0.8]))


def test_dual_clip_bounds_the_penalty_of_a_large_ratio():
    loss, _ = dual_clip(tensor([8.0, 8.0]).log(), zeros(2), tensor([1.0, -1.0]), ALL, **CLIP, clip_ratio_c=3.0)
    assert_close(loss, tensor([-1.2, 3.0]))  # regular: -1.2 and 8


def test_sapo_gates_softly_with_a_temperature_per_sign():
    loss, _ = sapo(tensor([2.0, 2.0]).log(), zeros(2), tensor([1.0, -1.0]), ALL, tau_pos=1.0, tau_neg=2.0)
    expected = tensor([-4.0 / (1 + math.exp(-1.0)), 2.0 / (1 + math.exp(-2.0))])
    assert_close(loss, expected)


def test_sapo_at_ratio_one_has_the_policy_gradient():
    advantages = tensor([1.0, -1.0])
    gradient = gradient_of(
        sapo, zeros(2), old_log_probs=zeros(2), advantages=advantages, loss_mask=ALL, tau_pos=1.0, tau_neg=1.05
    )
    assert_close(gradient, -advantages)


def test_gspo_clips_the_geometric_mean_of_the_sequence():
    log_ratio = tensor([9.0, math.log(4.0), 0.0, math.log(0.25)])
    mask = tensor([False, True, True, True])
    rows = tensor([0, 0, 0, 1])
    # row 0: sqrt(4 * 1) = 2 on both tokens, whatever the untrained one says; row 1: 0.25
    loss, metrics = gspo(log_ratio, zeros(4), tensor([0.0, 1.0, -1.0, 1.0]), mask, rows, **CLIP)
    assert_close(loss, tensor([0.0, -1.2, 2.0, -0.25]))
    assert metrics["clip_ratio"] == pytest.approx(1 / 3)


def test_gspo_sends_the_gradient_through_each_tokens_own_logprob():
    gradient = gradient_of(
        gspo,
        tensor([4.0, 1.0]).log(),
        old_log_probs=zeros(2),
        advantages=tensor([-1.0, -3.0]),
        loss_mask=ALL,
        sample_index=tensor([0, 0]),
        **CLIP,
    )
    assert_close(gradient, tensor([2.0, 6.0]))  # -A * 2


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    log_probs, old = tensor([8.0, 0.5]).log() - 3, tensor([-3.0, -3.0])
    bounds = {"cispo_eps_clip_low": 0.0, "cispo_eps_clip_high": 5.0}
    loss, metrics = cispo(log_probs, old, tensor([1.0, -1.0]), ALL, **bounds)
    assert_close(loss, tensor([-6.0, 1.0]) * log_probs)  # ratios 8 -> 6 and 0.5 -> 1
    assert metrics == {"clip_ratio": 1.0}
    gradient = gradient_of(cispo, log_probs, old_log_probs=old, advantages=tensor([1.0, -1.0]), loss_mask=ALL, **bounds)
    assert_close(gradient, tensor([-6.0, 1.0]))


def test_cross_entropy_is_minus_the_logprob():
    loss, _ = cross_entropy(tensor([-0.5, -2.0]), tensor([True, False]))
    assert loss.tolist() == [0.5, 0.0]


def test_importance_sampling_has_no_clip():
    loss, metrics = importance_sampling(tensor([2.0, 0.5]).log(), zeros(2), tensor([1.0, -1.0]), ALL)
    assert_close(loss, tensor([-2.0, 0.5]))
    assert metrics == {"importance_ratio": 1.25}


def region(divergence: str = "tv", largest: float | None = None) -> dict[str, Any]:
    return {"dppo_divergence": divergence, "dppo_max_divergence": largest, "dppo_max_ratio": 10.0}


def test_dppo_leaves_out_tokens_that_go_on_leaving_the_region():
    p, q = tensor([0.5, 0.5, 0.2, 0.2, 0.3]), tensor([0.3, 0.3, 0.4, 0.4, 0.2])
    advantages = tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    mask = torch.ones(5, dtype=torch.bool)
    arguments: dict[str, Any] = {"rollout_logprobs": q.log(), "advantages": advantages, "loss_mask": mask}
    # p - q: 0.2, A > 0: out; 0.2, A < 0: comes back; -0.2, A < 0: out; -0.2, A > 0: comes back; 0.1: in the region
    gradient = gradient_of(dppo, p.log(), **arguments, **region())
    assert_close(gradient, tensor([0.0, 5 / 3, 0.0, -0.5, -1.5]))  # -A p / q on log p
    loss, metrics = dppo(p.log(), q.log(), advantages, mask, **region())
    assert_close(loss, gradient * p.log())
    assert metrics["clip_ratio"] == pytest.approx(0.4)
    assert metrics["divergence"] == pytest.approx((4 * 0.2 + 0.1) / 5)
    wider = dppo(p.log(), q.log(), advantages, mask, **region(largest=0.25))
    assert wider[1]["clip_ratio"] == 0.0


def test_dppo_by_kl_and_with_a_capped_weight():
    p, q = tensor([0.75, 0.02]), tensor([0.99, 0.0001])
    advantages = tensor([-1.0, 1.0])
    loss, metrics = dppo(p.log(), q.log(), advantages, ALL, **region("kl"))
    # 0.99 ln(0.99 / 0.75) + 0.01 ln(0.01 / 0.25) = 0.2427: out;   0.0001 ln(0.005) + 0.9999 ln(0.9999 / 0.98) = 0.0196
    assert_close(loss, tensor([0.0, -10.0 * math.log(0.02)]))  # the weight would be 200
    assert metrics["divergence"] == pytest.approx((0.2427 + 0.0196) / 2, abs=1e-4)
    assert dppo(p.log(), q.log(), advantages, ALL, **region("kl", 0.3))[1]["clip_ratio"] == 0.0
    certain = dppo(zeros(2), tensor([0.0, -20.0]), advantages, ALL, **region("kl"))
    assert certain[0].isfinite().all()
    assert math.isfinite(certain[1]["divergence"])


def test_dppo_reads_nothing_outside_the_mask():
    mask, junk = tensor([False, True, False]), tensor([-torch.inf, -1.0, 500.0])
    arguments: dict[str, Any] = {
        "rollout_logprobs": tensor([500.0, -1.0, -torch.inf]),
        "advantages": tensor([0.0, 1.0, 0.0]),
    }
    for divergence in ("tv", "kl"):
        settings = region(divergence)
        loss, metrics = dppo(junk, loss_mask=mask, **arguments, **settings)
        assert_close(loss, tensor([0.0, 1.0, 0.0]))
        assert all(math.isfinite(value) for value in metrics.values())
        assert gradient_of(dppo, junk, loss_mask=mask, **arguments, **settings).tolist() == [0.0, -1.0, 0.0]


def test_rollout_is_weighs_by_the_ratio_to_the_engine_and_leaves_out_what_is_outside():
    ratio, advantages = tensor([1.1, 1.3, 0.9, 0.7]), tensor([2.0, 1.0, -1.0, 1.0])
    log_probs, engine = tensor([-1.0, -2.0, -3.0, -4.0]), tensor([-1.0, -2.0, -3.0, -4.0]) - ratio.log()
    arguments: dict[str, Any] = {"rollout_logprobs": engine, "advantages": advantages, **CLIP}
    loss, metrics = rollout_is(log_probs, loss_mask=torch.ones(4).bool(), **arguments)
    assert_close(loss, tensor([2.2, 0.0, -2.7, 0.0]))  # 1.3 and 0.7 are outside (0.8, 1.2), though 0.7 would come back
    assert metrics == {"clip_ratio": 0.5}
    gradient = gradient_of(rollout_is, log_probs, loss_mask=torch.ones(4).bool(), **arguments)
    assert_close(gradient, tensor([-2.2, 0.0, 0.9, 0.0]))  # -A r: nothing flows through the ratio
    junk: dict[str, Any] = {
        **arguments,
        "rollout_logprobs": tensor([torch.inf, -torch.inf, -3.0 - math.log(0.9), torch.nan]),
    }
    loss, _ = rollout_is(log_probs, loss_mask=tensor([False, False, True, False]), **junk)
    assert_close(loss, tensor([0.0, 0.0, -2.7, 0.0]))


def test_kl_cov_penalizes_the_share_of_tokens_with_the_highest_covariance():
    # mean A 2, mean log p -1.5: covariances -1.5, 0.5, -0.5, 1.5 -> the half is tokens 1 and 3
    log_probs, advantages = tensor([0.0, -1.0, -2.0, -3.0]), tensor([1.0, 3.0, 3.0, 1.0])
    loss, _ = kl_cov(
        log_probs, log_probs - math.log(2), advantages, torch.ones(4).bool(), kl_cov_frac=0.5, ppo_kl_coef=10.0
    )
    assert_close(loss, -2 * advantages + tensor([0.0, 10.0, 0.0, 10.0]) * math.log(2))


def test_kl_cov_penalizes_at_least_one_token():
    log_probs, advantages = tensor([0.0, -1.0, -2.0, -3.0]), tensor([1.0, -1.0, -1.0, 1.0])  # the first has the most
    loss, _ = kl_cov(log_probs, log_probs - 1, advantages, torch.ones(4).bool(), kl_cov_frac=0.01, ppo_kl_coef=1.0)
    assert_close(loss, -math.e * advantages + tensor([1.0, 0.0, 0.0, 0.0]))


def clip_cov_loss(clip_ratio, seed=0, log_probs=(0.0, -2.0, -4.0, -6.0), log_ratio=0.0):
    """A = 1 1 -1 -1; with the default logprobs (mean -3) the covariances are 3 1 1 3, the band is (0.5, 5)."""
    log_probs = tensor(log_probs)
    return clip_cov(
        log_probs,
        log_probs - log_ratio,
        tensor([1.0, 1.0, -1.0, -1.0]),
        torch.ones(4).bool(),
        torch.Generator().manual_seed(seed),
        **CLIP,
        clip_ratio=clip_ratio,
        clip_cov_lb=0.5,
        clip_cov_ub=5.0,
    )


def test_clip_cov_drops_tokens_in_the_covariance_band_at_random():
    dropped = set()
    for seed in range(20):
        loss, metrics = clip_cov_loss(clip_ratio=0.25, seed=seed)
        [token] = torch.nonzero(loss == 0).flatten().tolist()
        dropped.add(token)
        assert metrics == {"clip_ratio": 0.25}
    assert dropped == {0, 1, 2, 3}
    assert_close(clip_cov_loss(0.25, seed=3)[0], clip_cov_loss(0.25, seed=3)[0])


def test_clip_cov_drops_at_least_one_token_and_never_more_than_there_are():
    assert int((clip_cov_loss(clip_ratio=0.0)[0] == 0).sum()) == 1
    assert int((clip_cov_loss(clip_ratio=2.0)[0] == 0).sum()) == 4


@pytest.mark.parametrize("scale", [0.05, 10.0])  # covariances 0.15 0.05 0.05 0.15, or 30 10 10 30
def test_clip_cov_leaves_tokens_outside_the_band_alone(scale):
    loss, _ = clip_cov_loss(clip_ratio=1.0, log_probs=(0.0, -2 * scale, -4 * scale, -6 * scale))
    assert_close(loss, tensor([-1.0, -1.0, 1.0, 1.0]))


def test_clip_cov_leaves_clipped_tokens_to_the_clip():
    loss, metrics = clip_cov_loss(clip_ratio=1.0, log_ratio=math.log(2))  # the first two are clipped at 1.2
    assert_close(loss, tensor([-1.2, -1.2, 0.0, 0.0]))
    assert metrics == {"clip_ratio": 1.0}


EVERY_LOSS = [
    (clipped_surrogate, CLIP),
    (dual_clip, {**CLIP, "clip_ratio_c": 3.0}),
    (sapo, {"tau_pos": 1.0, "tau_neg": 1.05}),
    (gspo, {**CLIP, "sample_index": tensor([0, 0, 0])}),
    (cispo, {"cispo_eps_clip_low": 0.0, "cispo_eps_clip_high": 5.0}),
    (importance_sampling, {}),
    (kl_cov, {"kl_cov_frac": 0.2, "ppo_kl_coef": 1.0}),
]


@pytest.mark.parametrize(("loss_function", "settings"), EVERY_LOSS)
def test_junk_outside_the_mask_reaches_neither_loss_nor_gradient(loss_function, settings):
    mask = tensor([False, True, False])
    arguments = {"old_log_probs": tensor([-500.0, -1.0, 0.0]), "advantages": tensor([0.0, 1.0, 0.0]), "loss_mask": mask}
    log_probs = tensor([0.0, -1.0, -torch.inf])
    loss, metrics = loss_function(log_probs=log_probs, **arguments, **settings)
    assert loss[~mask].tolist() == [0.0, 0.0]
    assert all(math.isfinite(value) for value in metrics.values())
    gradient = gradient_of(loss_function, log_probs, **arguments, **settings)
    assert gradient[~mask].tolist() == [0.0, 0.0]
    assert gradient[1] == -1.0  # at ratio 1 every one of them is the policy gradient


@pytest.mark.parametrize(("loss_function", "settings"), EVERY_LOSS)
def test_a_huge_ratio_stays_finite(loss_function, settings):
    loss, _ = loss_function(
        log_probs=tensor([0.0, 0.0, 0.0]),
        old_log_probs=tensor([-500.0, 500.0, 0.0]),
        advantages=tensor([-1.0, 1.0, 1.0]),
        loss_mask=tensor([True, True, True]),
        **settings,
    )
    assert loss.isfinite().all()


def test_gmpo_clips_the_logarithm_of_each_token_and_averages_them():
    # row 0, A = 1: ln r = 0.1, 1.0, at most 0.2: 0.1, 0.2 -> mean 0.15
    # row 1, A = -1: ln r = 1, -1, at least -0.2: 1, -0.2 -> mean 0.4
    log_probs = tensor([0.0, 0.1, 1.0, 0.0, 1.0, -1.0])
    mask = tensor([False, True, True, False, True, True])
    rows = tensor([0, 0, 0, 1, 1, 1])
    advantages = tensor([9.0, 1, 1, 9, -1, -1])
    arguments: Any = {"old_log_probs": zeros(6), "advantages": advantages, "loss_mask": mask, "sample_index": rows}
    arguments |= CLIP
    loss, metrics = gmpo(log_probs, **arguments)
    first, second = math.exp(0.15), math.exp(0.4)
    assert_close(loss, tensor([0, -first, -first, 0, second, second]))
    assert metrics == {"clip_ratio": 0.5}
    # the mean over a row's tokens is its loss, so each free token gets ratio / 2 per token of the row: ratio in all
    gradient = gradient_of(gmpo, log_probs, **arguments)
    assert_close(gradient, tensor([0, -first, 0, 0, second, 0]))
