"""Settings of advantages, losses, KL and entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section

OWN_ESTIMATORS = (
    "grpo", "rloo", "maxrl", "opo", "gpg", "pass_at_k", "gdpo", "reinforce++", "gae", "distillation",
)  # fmt: skip
OWN_LOSSES = (
    "regular", "dual_clip", "gspo", "cispo", "clip_cov", "kl_cov", "sapo", "cross_entropy", "importance_sampling",
    "dppo", "gmpo", "rollout_is",
)  # fmt: skip
# Names a configuration may use. Registering an estimator or a loss adds its name here, so that names can be checked
# without importing torch; "package.module:function" works without registering.
ADVANTAGE_ESTIMATORS: set[str] = set(OWN_ESTIMATORS)
POLICY_LOSSES: set[str] = set(OWN_LOSSES)
# These take no off-policy correction.
UNCORRECTED_LOSSES = ("clip_cov", "kl_cov", "cross_entropy", "importance_sampling", "dppo", "rollout_is")
ENGINE_LOSSES = ("dppo", "rollout_is")  # their ratio is that to rollout_logprobs


THRESHOLDS = ("outlier_token_is_threshold", "token_mask_is_threshold")


@dataclass
class KLCtrlConfig(Section, at="trainer.algorithm.kl_ctrl"):
    """The weight of the KL penalty in the reward."""

    type: str = "fixed"  # fixed: kl_loss_coef stays; adaptive: it moves towards kl_target
    kl_target: float = 0.1  # adaptive: the KL to aim for
    horizon: int = 10000  # adaptive: samples over which the weight adapts

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("type", ("fixed", "adaptive"))
        yield from self.at_least(1, "horizon")
        if self.kl_target <= 0:
            yield self.problem("kl_target", "must be above 0")


@dataclass
class OffPolicyCorrectionConfig(Section, at="trainer.algorithm.off_policy_correction"):
    """Corrections where the engine's probabilities differ from the learner's: token weights, or dropped sequences."""

    tis_ratio_type: str | None = None  # truncated importance weights per token or per sequence; null: none
    token_tis_ratio_clip_high: float = 2.0  # cap of a token's weight
    sequence_tis_ratio_clip_high: float = 5.0  # cap of a sequence's weight
    sequence_mask_metric: str | None = None  # drop sequences by the product or geometric mean of ratios; null: none
    geo_mask_high: float = 1.01  # geometric: a sequence above is dropped
    geo_mask_low: float = 0.99  # geometric: a sequence below is dropped
    product_mask_high: float = 2.0  # product: a sequence above is dropped
    product_mask_low: float = 0.5  # product: a sequence below is dropped
    outlier_token_is_threshold_low: float | None = None  # a sequence with any token ratio below is dropped
    outlier_token_is_threshold_high: float | None = None  # a sequence with any token ratio above is dropped
    token_mask_is_threshold_low: float | None = None  # a token with a ratio below is dropped
    token_mask_is_threshold_high: float | None = None  # a token with a ratio above is dropped

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("tis_ratio_type", (None, "token", "sequence"))
        yield from self.one_of("sequence_mask_metric", (None, "product", "geometric"))
        for key in ("token_tis_ratio_clip_high", "sequence_tis_ratio_clip_high"):
            if getattr(self, key) <= 0:
                yield self.problem(key, "caps an importance weight, so it must be above 0")
        for kind in ("outlier_token", "token_mask"):
            low, high = (getattr(self, f"{kind}_is_threshold_{side}") for side in ("low", "high"))
            if low is not None and high is not None and low >= high:
                yield self.problem(f"{kind}_is_threshold_low", f"must be below {kind}_is_threshold_high={high}")
        for kind in ("geo", "product"):
            if getattr(self, f"{kind}_mask_low") >= getattr(self, f"{kind}_mask_high"):
                high = getattr(self, f"{kind}_mask_high")
                yield self.problem(f"{kind}_mask_low", f"must be below {kind}_mask_high={high}")

    @property
    def is_on(self) -> bool:
        return self.tis_ratio_type is not None or self.rejects

    @property
    def rejects(self) -> bool:
        """Return whether tokens or whole samples may be dropped."""
        thresholds = (getattr(self, f"{kind}_{side}") for kind in THRESHOLDS for side in ("low", "high"))
        return self.sequence_mask_metric is not None or any(bound is not None for bound in thresholds)


@dataclass
class SAPOConfig(Section, at="trainer.algorithm.sapo"):
    """The soft gate of SAPO."""

    tau_pos: float = 1.0  # gate temperature where the advantage is positive
    tau_neg: float = 1.05  # gate temperature elsewhere

    def rules(self) -> Iterator[Problem]:
        for key in ("tau_pos", "tau_neg"):
            if getattr(self, key) <= 0:
                yield self.problem(key, "must be above 0")


@dataclass
class ClipCovConfig(Section, at="trainer.algorithm.clip_cov"):
    """The tokens that Clip-Cov drops."""

    clip_ratio: float = 0.0002  # share of tokens to drop, at least one
    clip_cov_lb: float = 1.0  # only tokens with a covariance above this
    clip_cov_ub: float = 5.0  # and below this

    def rules(self) -> Iterator[Problem]:
        yield from self.within(0, 1, "clip_ratio")
        if self.clip_cov_lb >= self.clip_cov_ub:
            yield self.problem("clip_cov_lb", f"must be below clip_cov_ub={self.clip_cov_ub}")


@dataclass
class KLCovConfig(Section, at="trainer.algorithm.kl_cov"):
    """The tokens to which KL-Cov adds a KL penalty."""

    kl_cov_frac: float = 0.2  # share of tokens that get the penalty, at least one
    ppo_kl_coef: float = 1.0  # weight of the penalty

    def rules(self) -> Iterator[Problem]:
        yield from self.within(0, 1, "kl_cov_frac")


@dataclass
class CISPOConfig(Section, at="trainer.algorithm.cispo"):
    """The bounds of CISPO's importance weight."""

    cispo_eps_clip_low: float = 0.0  # the weight is kept above 1 - this
    cispo_eps_clip_high: float = 5.0  # the weight is kept below 1 + this

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(0, "cispo_eps_clip_low", "cispo_eps_clip_high")


@dataclass
class DPPOConfig(Section, at="trainer.algorithm.dppo"):
    """The trust region of DPPO, around the engine's probabilities."""

    dppo_divergence: str = "tv"  # tv: total variation; kl: Kullback-Leibler; of the sampled token against the rest
    dppo_max_divergence: float | None = None  # tokens beyond do not move on; null: 0.15 for tv, 0.05 for kl
    dppo_max_ratio: float = 10.0  # cap of a token's importance weight

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("dppo_divergence", ("tv", "kl"))
        for key in ("dppo_max_divergence", "dppo_max_ratio"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                yield self.problem(key, "must be above 0")


@dataclass
class DynamicSamplingConfig(Section, at="trainer.algorithm.dynamic_sampling"):
    """Sampling until enough prompts have episodes that score differently (DAPO)."""

    type: str | None = None  # filter: drop the others and play more; replace: put these in their place; null: off
    max_sample_batches: int = 30  # batches of one step; the run ends with an error after so many; <= 0: no limit
    min_replace_ratio: float = 0.3  # replace: a batch of which no larger share scores differently is dropped

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("type", (None, "filter", "replace"))
        if not 0 <= self.min_replace_ratio < 1:
            yield self.problem("min_replace_ratio", "must be at least 0 and below 1")


@dataclass
class OverlongPenaltyConfig(Section, at="trainer.algorithm.overlong_penalty"):
    """The soft penalty of DAPO for replies that come near the length limit."""

    # length penalty: of a reply's last tokens before max_generate_length, each costs factor / len; 0: none
    len: int = 0
    factor: float = 1.0  # what a reply of max_generate_length tokens loses

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(0, "len")
        if self.factor <= 0:
            yield self.problem("factor", "is taken from the reward, so it must be above 0")
        elif self.len == 0 and self.factor != 1.0:
            yield self.problem("factor", "has no effect with overlong_penalty.len=0; drop it, or set len")


@dataclass
class DistillationConfig(Section, at="trainer.algorithm.distillation"):
    """Settings of on-policy distillation; trainer.ref.model.path is the teacher."""

    reward_weight: float = 0.0  # distillation: weight of GRPO's advantages of the rewards beside the teacher's; 0: none

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(0, "reward_weight")


@dataclass
class AlgorithmConfig(Section, at="trainer.algorithm"):
    """Advantages, losses, KL and entropy."""

    # grpo, rloo, maxrl, opo, gpg, pass_at_k, gdpo, reinforce++, gae, distillation, a registered name, or
    # package.module:function
    advantage_estimator: str = "grpo"
    kl_ctrl: KLCtrlConfig = field(default_factory=KLCtrlConfig)
    kl_estimator_type: str = "k3"  # k1, k2, k3 or abs
    use_kl_in_reward: bool = False  # subtract the KL from the token rewards; excludes use_kl_loss
    use_kl_loss: bool = True  # add the KL to the policy loss: a mean over episodes, whatever loss_reduction is
    kl_loss_coef: float = 0.001  # weight of either use of the KL
    use_entropy_loss: bool = False  # subtract the entropy from the loss: a mean over tokens, whatever loss_reduction is
    entropy_loss_coef: float = 0.01  # weight of the entropy
    advantage_batch_normalize: bool = False  # whiten the advantages over the trained tokens of the batch
    policy_loss_type: str = "regular"  # a loss by name, a registered name, or package.module:function
    loss_reduction: str = "token_mean"  # of the policy loss: token_mean, sequence_mean or seq_mean_token_sum_norm
    grpo_norm_by_std: bool = True  # divide GRPO advantages by the group's standard deviation (Dr. GRPO: false)
    zero_variance_filter: bool = False  # leave groups whose rewards are all equal out of the loss
    gamma: float = 1.0  # discount of later token rewards (reinforce++, gae)
    lambd: float = 1.0  # gae: 1 trusts the rewards alone, 0 the critic's values alone
    value_clip: float | None = 0.2  # how far an update may move a value before its gain ends; null: plain squared error
    eps_clip_low: float = 0.2  # the ratio is kept above 1 - this; in gmpo, its logarithm above - this
    eps_clip_high: float = 0.2  # the ratio is kept below 1 + this; DAPO's "clip higher" uses 0.28
    clip_ratio_c: float = 3.0  # dual_clip: bound of the loss where the advantage is negative
    # Divisor of seq_mean_token_sum_norm; null is generator.max_input_length + max_generate_length.
    max_seq_len: int | None = None
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    overlong_penalty: OverlongPenaltyConfig = field(default_factory=OverlongPenaltyConfig)
    off_policy_correction: OffPolicyCorrectionConfig = field(default_factory=OffPolicyCorrectionConfig)
    sapo: SAPOConfig = field(default_factory=SAPOConfig)
    clip_cov: ClipCovConfig = field(default_factory=ClipCovConfig)
    kl_cov: KLCovConfig = field(default_factory=KLCovConfig)
    cispo: CISPOConfig = field(default_factory=CISPOConfig)
    dppo: DPPOConfig = field(default_factory=DPPOConfig)

    def rules(self) -> Iterator[Problem]:
        yield from self._known("advantage_estimator", ADVANTAGE_ESTIMATORS)
        yield from self._known("policy_loss_type", POLICY_LOSSES)
        yield from self.one_of("kl_estimator_type", ("k1", "k2", "k3", "abs"))
        yield from self.one_of("loss_reduction", ("token_mean", "sequence_mean", "seq_mean_token_sum_norm"))
        yield from self.within(0, 1, "gamma", "lambd", "eps_clip_low")
        yield from self.at_least(0, "eps_clip_high", "kl_loss_coef", "entropy_loss_coef")
        yield from self.finite("kl_loss_coef", "entropy_loss_coef")
        yield from self.at_least(1, "max_seq_len")
        if self.value_clip is not None and self.value_clip <= 0:
            yield self.problem("value_clip", "must be above 0; null is no clipping")
        if self.clip_ratio_c <= 1:
            yield self.problem("clip_ratio_c", "must be above 1, else it would cut the unclipped loss")
        if self.use_kl_in_reward and self.use_kl_loss:
            yield self.problem(
                "use_kl_in_reward",
                "would count the KL twice beside use_kl_loss=true (its default); "
                "add trainer.algorithm.use_kl_loss=false, or drop use_kl_in_reward",
                ("trainer.algorithm.use_kl_in_reward=true", "trainer.algorithm.use_kl_loss=false"),
            )
        if self.distills and (self.use_kl_loss or self.use_kl_in_reward):
            yield self.problem(
                "advantage_estimator",
                "measures the policy against the teacher already, and a KL term would do it once more; add "
                "trainer.algorithm.use_kl_loss=false, and drop use_kl_in_reward",
                ("trainer.algorithm.advantage_estimator=distillation", "trainer.algorithm.use_kl_loss=false"),
            )
        if self.advantage_estimator == "gdpo" and (self.use_kl_in_reward or self.zero_variance_filter):
            key = "use_kl_in_reward" if self.use_kl_in_reward else "zero_variance_filter"
            yield self.problem(key, "reads the sum of the rewards, which advantage_estimator=gdpo keeps apart; drop it")
        yield from self._correction_rules()

    @property
    def distills(self) -> bool:
        """Return whether the reference policy is a teacher."""
        return self.advantage_estimator == "distillation"

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Return whether the update compares with the engine's logprobs."""
        return self.off_policy_correction.is_on or self.policy_loss_type in ENGINE_LOSSES

    def _known(self, key: str, names: set[str]) -> Iterator[Problem]:
        value = getattr(self, key)
        module, colon, function = value.partition(":")
        if colon and all(part.isidentifier() for part in [*module.split("."), function]):
            return
        if value not in names:
            known = ", ".join(sorted(names))
            says = f"is not known; take one of {known}, or name a function as package.module:function"
            yield self.problem(key, says, self.nearest(key, sorted(names)))

    def _correction_rules(self) -> Iterator[Problem]:
        correction = self.off_policy_correction
        if correction.is_on and self.policy_loss_type in UNCORRECTED_LOSSES:
            yield self.problem(
                "policy_loss_type",
                "takes no off-policy correction; drop trainer.algorithm.off_policy_correction, or take another loss",
                drops=("trainer.algorithm.off_policy_correction",),
            )
