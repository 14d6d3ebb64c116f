"""The learner on a tiny model: the gradient is the right one, however the batch is cut, and a resumed run continues."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.algorithms.kl import token_kl
from skyrl_train.batch.packing import with_loss_weights
from skyrl_train.config import AlgorithmConfig, OptimizerConfig, TrainerConfig
from skyrl_train.config.algorithm import OffPolicyCorrectionConfig
from skyrl_train.config.models import PolicyConfig
from skyrl_train.learner.learner import TorchLearner, needs_reference
from skyrl_train.policy.model_files import load_tokenizer
from tests.skyrl_train.batches import random_batch
from tests.tiny_models import tiny_policy, tiny_tokenizer

PLAIN: dict[str, Any] = {"use_kl_loss": False}
LOSSES = ["regular", "dual_clip", "gspo", "cispo", "clip_cov", "kl_cov", "sapo", "cross_entropy", "importance_sampling"]


Settings = dict[str, Any]


def trainer_config(algorithm: Settings = PLAIN, optimizer: Settings | None = None, **trainer: Any) -> TrainerConfig:
    settings: Settings = {"train_batch_size": 3, "policy_mini_batch_size": 3, **trainer}
    adam: Settings = {"lr": 1e-2, **(optimizer or {})}
    policy = PolicyConfig(optimizer_config=OptimizerConfig(**adam))
    return TrainerConfig(algorithm=AlgorithmConfig(**algorithm), policy=policy, **settings)


def learner_for(config, *, policy=None, reference=None, **arguments):
    return TorchLearner(policy or tiny_policy(), config, num_training_steps=10, reference=reference, **arguments)


def prepared(learner, config, batch=None):
    return add_advantages(learner.add_logprobs(random_batch() if batch is None else batch), config.algorithm)


def gradients_of(config, batch, monkeypatch, **arguments):
    """The gradients at the first optimizer step of an update."""
    learner = learner_for(config, **arguments)
    caught = []

    def catch():
        caught.append({name: p.grad.clone() for name, p in learner.policy.module.named_parameters()})
        return original()

    original = learner._optimizer.step
    monkeypatch.setattr(learner._optimizer, "step", catch)
    metrics = learner.update(batch)
    return caught[0], metrics


def relative_difference(ours, theirs):
    difference = sum(((ours[name] - theirs[name]).double() ** 2).sum() for name in theirs)
    return float((difference / sum((theirs[name].double() ** 2).sum() for name in theirs)) ** 0.5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_the_gradient_is_that_of_a_padded_batch_in_plain_transformers(reduction, monkeypatch):
    algorithm = {"loss_reduction": reduction, "max_seq_len": 20, "kl_loss_coef": 0.1, "use_entropy_loss": True}
    config = trainer_config(algorithm, max_tokens_per_microbatch=30)
    policy, reference = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for parameter in reference.module.parameters():
            parameter *= 1.1  # near enough for k3 to stay below its bound
    learner = learner_for(config, policy=policy, reference=reference, temperature=1.3)
    batch = prepared(learner, config)
    ours, metrics = gradients_of(config, batch, monkeypatch, policy=policy, reference=reference, temperature=1.3)

    policy = tiny_policy()
    rows, length = batch.num_samples, int(batch.lengths.max())
    place = batch.sample_index * length + batch.position_ids

    def padded(tensor):
        return torch.zeros(rows * length, dtype=tensor.dtype).index_put((place,), tensor).reshape(rows, length)

    ids, mask = padded(batch.input_ids), padded(batch.loss_mask)
    policy.module.set_attn_implementation("eager")
    attention_mask = padded(torch.ones_like(batch.input_ids))
    logits = policy.module(input_ids=ids, attention_mask=attention_mask).logits[:, :-1] / 1.3
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(2, ids[:, 1:, None])[..., 0]
    mask, advantages, ref = mask[:, 1:].float(), padded(batch.advantages)[:, 1:], padded(batch.ref_logprobs)[:, 1:]
    entropy = -(log_p.exp() * log_p).sum(-1)
    d = logprobs - ref
    per_token = -(logprobs - logprobs.detach()).exp() * advantages * mask
    kl = (-d).exp() + d - 1
    if reduction == "token_mean":
        loss = per_token.sum() / mask.sum()
    elif reduction == "sequence_mean":
        loss = (per_token.sum(1) / mask.sum(1)).mean()
    else:
        loss = (per_token.sum(1) / 20).mean()
    # SkyRL's: the KL is a mean over samples and the entropy one over tokens, whatever the reduction of the policy loss
    loss = loss + 0.1 * ((kl * mask).sum(1) / mask.sum(1)).mean() - 0.01 * (entropy * mask).sum() / mask.sum()
    loss.backward()
    theirs = {name: p.grad for name, p in policy.module.named_parameters()}
    assert relative_difference(ours, theirs) < 1e-5  # two different forward passes, in float32
    assert metrics["policy/final_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["policy/policy_entropy"] == pytest.approx(((entropy * mask).sum() / mask.sum()).item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("limits", [{"max_tokens_per_microbatch": 25}, {"micro_train_batch_size_per_gpu": 1}])
def test_micro_batches_do_not_change_the_gradient(loss, limits, monkeypatch):
    algorithm = {"policy_loss_type": loss, "kl_loss_coef": 0.1}
    whole, cut = trainer_config(algorithm), trainer_config(algorithm, **limits)
    reference = tiny_policy(seed=1)
    learner = learner_for(whole, reference=reference)
    batch = prepared(learner, whole)
    batch = replace(batch, old_logprobs=batch.rollout_logprobs)  # far away: clips and covariances act
    expected, expected_metrics = gradients_of(whole, batch, monkeypatch, reference=reference)
    gradients, metrics = gradients_of(cut, batch, monkeypatch, reference=reference)
    assert relative_difference(gradients, expected) < 1e-6
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradient_checkpointing_does_not_change_the_gradient(family, monkeypatch):
    config = trainer_config()
    batch = prepared(learner_for(config), config)
    expected, _ = gradients_of(config, batch, monkeypatch, policy=tiny_policy(family))
    gradients, _ = gradients_of(config, batch, monkeypatch, policy=tiny_policy(family, gradient_checkpointing=True))
    assert relative_difference(gradients, expected) < 1e-6


def test_a_filtered_group_neither_pulls_nor_counts_in_the_divisor(monkeypatch):
    config = trainer_config()
    batch = prepared(learner_for(config), config)
    kept = batch.select([i for i in range(batch.num_samples) if batch.group_index[i] != 1])
    mask = batch.loss_mask & (batch.group_index[batch.sample_index] != 1)
    expected, _ = gradients_of(config, kept, monkeypatch)
    gradients, _ = gradients_of(config, replace(batch, loss_mask=mask), monkeypatch)
    assert relative_difference(gradients, expected) < 1e-6


def test_old_logprobs_are_the_updates_own_when_there_is_a_single_step(monkeypatch):
    config = trainer_config()
    learner = learner_for(config)
    batch = prepared(learner, config)
    assert batch.old_logprobs is None
    old = learner._logprobs(learner.policy, batch)
    assert old[batch.loss_mask].max() < 0
    implicit, metrics = gradients_of(config, batch, monkeypatch)
    explicit, same_metrics = gradients_of(config, replace(batch, old_logprobs=old), monkeypatch)
    assert relative_difference(implicit, explicit) < 1e-6
    name = "policy/rollout_train_logprobs_abs_diff_mean"
    drift = (old - batch.rollout_logprobs)[batch.loss_mask].abs()
    assert metrics[name] == pytest.approx(same_metrics[name], rel=1e-5) == pytest.approx(float(drift.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "trainer"),
    [
        (PLAIN, {"policy_mini_batch_size": 1}),
        (PLAIN, {"update_epochs_per_batch": 2}),
        ({"use_kl_loss": False, "use_kl_in_reward": True}, {}),
        ({**PLAIN, "off_policy_correction": OffPolicyCorrectionConfig(sequence_mask_metric="geometric")}, {}),
    ],
)
def test_old_logprobs_are_computed_when_the_policy_moves_or_someone_needs_them_before(algorithm, trainer):
    config = trainer_config(algorithm, **trainer)
    learner = learner_for(config, reference=tiny_policy(seed=1))
    batch = learner.add_logprobs(random_batch())
    assert batch.old_logprobs is not None
    assert batch.old_logprobs[batch.loss_mask].max() < 0


def test_several_steps_without_old_logprobs_are_refused():
    config = trainer_config(update_epochs_per_batch=2)
    learner = learner_for(config)
    batch = replace(prepared(learner, config), old_logprobs=None)
    with pytest.raises(ValueError, match="2 optimizer steps need old_logprobs"):
        learner.update(batch)


def test_the_reference_is_asked_only_when_the_kl_has_a_weight():
    assert not needs_reference(AlgorithmConfig(kl_loss_coef=0.0))
    assert not needs_reference(AlgorithmConfig(use_kl_loss=False))
    assert needs_reference(AlgorithmConfig(use_kl_loss=False, use_kl_in_reward=True))
    assert needs_reference(AlgorithmConfig(use_kl_loss=True))
    with pytest.raises(ValueError, match="reference"):
        learner_for(trainer_config({"use_kl_loss": True}))


def test_policy_and_reference_logprobs_have_the_same_temperature():
    config = trainer_config({"use_kl_loss": True}, update_epochs_per_batch=2)
    learner = learner_for(config, reference=tiny_policy(), temperature=0.6)
    batch = learner.add_logprobs(random_batch())
    assert_close(batch.ref_logprobs, batch.old_logprobs)


def test_the_reference_becomes_the_policy_when_asked():
    config = trainer_config({"use_kl_loss": True}, update_epochs_per_batch=2)
    learner = learner_for(config, reference=tiny_policy(seed=1))
    batch = learner.add_logprobs(random_batch())
    assert (batch.ref_logprobs - batch.old_logprobs).abs().max() > 0.1
    learner.update_reference()
    batch = learner.add_logprobs(random_batch())
    assert_close(batch.ref_logprobs, batch.old_logprobs)


def test_the_kl_in_the_loss_has_a_gradient(monkeypatch):
    config = trainer_config({"kl_loss_coef": 0.5})
    reference = tiny_policy(seed=1)
    batch = prepared(learner_for(config, reference=reference), config)
    batch = replace(batch, advantages=torch.zeros(batch.num_tokens))
    gradients, metrics = gradients_of(config, batch, monkeypatch, reference=reference)
    assert sum(float(g.abs().sum()) for g in gradients.values()) > 0.1
    now = learner_for(trainer_config({}, update_epochs_per_batch=2), reference=reference).add_logprobs(batch)
    kl = token_kl(now.old_logprobs, now.ref_logprobs, batch.loss_mask, "k3")
    weights = with_loss_weights(batch, "token_mean").kl_weights
    assert weights is not None
    assert metrics["policy/final_loss"] == pytest.approx(0.5 * float((weights * kl).sum()), rel=1e-4)
    assert metrics["policy/policy_loss"] == 0


def test_training_pulls_the_policy_towards_what_was_rewarded():
    config = trainer_config(optimizer={"lr": 3e-3})
    learner = learner_for(config)
    batch = prepared(learner, config)
    better = batch.loss_mask & (batch.advantages > 0)
    worse = batch.loss_mask & (batch.advantages < 0)
    before = learner._logprobs(learner.policy, batch)
    learner.update(batch)
    after = learner._logprobs(learner.policy, batch)
    assert (after - before)[better].mean() > 0.01
    assert (after - before)[worse].mean() < -0.01


def test_every_mini_batch_is_one_step_and_the_remainder_too():
    config = trainer_config(train_batch_size=4, policy_mini_batch_size=2, update_epochs_per_batch=2)
    learner = learner_for(config)
    seen = []
    batch = prepared(learner, config)  # three prompts: mini batches of two and one
    metrics = learner.update(batch, on_tokens=lambda done, total: seen.append((done, total)))
    assert learner.policy_version == metrics["policy/policy_version"] == 4
    assert seen[-1] == (2 * batch.num_tokens, 2 * batch.num_tokens)
    assert metrics["policy/policy_lr"] == pytest.approx(1e-2)
    assert metrics["policy/grad_norm"] > 0


def test_a_batch_that_was_filtered_out_whole_moves_nothing():
    config = trainer_config()
    learner = learner_for(config)
    batch = prepared(learner, config)
    weights = {name: p.detach().clone() for name, p in learner.policy.module.named_parameters()}
    metrics = learner.update(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
    assert learner.policy_version == metrics["policy/num_skipped_steps"] == 0
    assert all(torch.equal(p, weights[name]) for name, p in learner.policy.module.named_parameters())


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    config = trainer_config()
    learner = learner_for(config)
    batch = prepared(learner, config)
    advantages = batch.advantages.clone()
    advantages[batch.loss_mask.nonzero()[0]] = torch.nan
    weights = {name: p.detach().clone() for name, p in learner.policy.module.named_parameters()}
    metrics = learner.update(replace(batch, advantages=advantages))
    assert metrics["policy/num_skipped_steps"] == 1
    assert learner.policy_version == 0
    assert all(torch.equal(p, weights[name]) for name, p in learner.policy.module.named_parameters())
    assert learner.update(batch)["policy/num_skipped_steps"] == 0
    assert learner.policy_version == 1


def test_an_interrupted_update_leaves_no_gradient_behind():
    def stop(done, total):
        raise KeyboardInterrupt

    config = trainer_config()
    interrupted, fresh = learner_for(config), learner_for(config)
    batch = prepared(fresh, config)
    with pytest.raises(KeyboardInterrupt):
        interrupted.update(batch, on_tokens=stop)
    assert interrupted.update(batch)["policy/grad_norm"] == fresh.update(batch)["policy/grad_norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_learner_holds_no_gradient_and_leaves_the_policy_to_others(dtype):
    def stop(done, total):
        raise KeyboardInterrupt

    config = trainer_config()
    learner = learner_for(config, policy=tiny_policy(compute_dtype=dtype))
    batch = prepared(learner, config)
    with pytest.raises(KeyboardInterrupt):
        learner.update(batch, on_tokens=stop)
    masters = list(learner._optimizer.masters.values())
    assert any(master.grad is not None for master in masters)
    weights = {name: p.detach().clone() for name, p in learner.policy.module.named_parameters()}
    learner.close()
    assert all(master.grad is None for master in masters)
    assert all(torch.equal(p, weights[name]) for name, p in learner.policy.module.named_parameters())


def test_a_sample_that_drifted_too_far_is_left_out(monkeypatch):
    correction = OffPolicyCorrectionConfig(sequence_mask_metric="geometric")
    config = trainer_config({**PLAIN, "off_policy_correction": correction})
    batch = prepared(learner_for(config), config)
    batch = replace(batch, rollout_logprobs=batch.old_logprobs.clone())
    batch.rollout_logprobs[: int(batch.offsets[3])] -= 1.0  # the first three samples
    gradients, metrics = gradients_of(config, batch, monkeypatch)
    rest = batch.select(list(range(3, batch.num_samples)))
    expected, _ = gradients_of(trainer_config(), rest, monkeypatch)
    assert relative_difference(gradients, expected) < 1e-6
    assert metrics["policy/loss_metrics/geo_sequence_mask_masked_ratio"] == pytest.approx(3 / 12)


def test_truncated_importance_weights_scale_the_policy_loss(monkeypatch):
    correction = OffPolicyCorrectionConfig(tis_ratio_type="token", token_tis_ratio_clip_high=3.0)
    corrected = trainer_config({**PLAIN, "off_policy_correction": correction})
    batch = prepared(learner_for(corrected), corrected)
    learner = learner_for(corrected)
    old = learner._logprobs(learner.policy, batch)
    batch = replace(batch, rollout_logprobs=old - 10.0 * batch.loss_mask)  # every ratio is above the cap
    gradients, metrics = gradients_of(corrected, batch, monkeypatch)
    expected, _ = gradients_of(trainer_config(), batch, monkeypatch)
    assert relative_difference(gradients, {name: 3.0 * g for name, g in expected.items()}) < 1e-6
    assert metrics["policy/loss_metrics/tis_token_clip_high_ratio"] == 1.0
    assert metrics["policy/loss_metrics/is_ratio_mean"] == pytest.approx(2.718281828**10, rel=1e-3)


def a_custom_loss(log_probs, advantages, config):
    return -log_probs * advantages * config.clip_ratio_c, {"mine_max": 4.0}


def a_reduced_loss(log_probs, advantages):
    return (log_probs * advantages).sum(-1), {}  # one number per row


def test_a_custom_loss_comes_in_by_import_path(monkeypatch):
    config = trainer_config({**PLAIN, "policy_loss_type": f"{__name__}:a_custom_loss"})
    batch = prepared(learner_for(config), config)
    gradients, metrics = gradients_of(config, batch, monkeypatch)
    expected, _ = gradients_of(trainer_config(), batch, monkeypatch)  # at ratio 1 the clipped loss is the same
    assert relative_difference(gradients, {name: 3.0 * g for name, g in expected.items()}) < 1e-6
    assert metrics["policy/loss_metrics/mine_max"] == 4.0


def a_loss_with_junk(log_probs, advantages, loss_mask):
    return torch.where(loss_mask, -log_probs * advantages, torch.nan), {}


def test_junk_of_a_custom_loss_outside_the_mask_counts_nothing(monkeypatch):
    config = trainer_config({**PLAIN, "policy_loss_type": f"{__name__}:a_loss_with_junk"})
    batch = prepared(learner_for(config), config)
    gradients, metrics = gradients_of(config, batch, monkeypatch)
    expected, expected_metrics = gradients_of(trainer_config(), batch, monkeypatch)
    assert relative_difference(gradients, expected) < 1e-6
    assert torch.tensor(metrics["policy/final_loss"]).isfinite()
    assert metrics["policy/grad_norm"] == pytest.approx(expected_metrics["policy/grad_norm"])


def test_a_custom_loss_that_reduces_its_rows_is_refused():
    config = trainer_config({**PLAIN, "policy_loss_type": f"{__name__}:a_reduced_loss"})
    learner = learner_for(config)
    with pytest.raises(ValueError, match="one loss per token"):
        learner.update(prepared(learner, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_learner_continues_bit_for_bit(dtype, tmp_path):
    config = trainer_config(
        {"kl_loss_coef": 0.1}, {"scheduler": "linear", "num_warmup_steps": 1}, policy_mini_batch_size=1,
        update_ref_every_epoch=True,
    )  # fmt: skip

    def new(seed):
        return learner_for(
            config,
            policy=tiny_policy(seed=seed, compute_dtype=dtype),
            reference=tiny_policy(seed=seed + 1, compute_dtype=dtype),
        )

    def train(learner, seeds):
        for seed in seeds:
            learner.update(prepared(learner, config, random_batch(seed=seed)))
            learner.update_reference()

    unbroken = new(seed=0)
    train(unbroken, [0])
    unbroken.save(tmp_path).result()
    train(unbroken, [1, 2])

    resumed = new(seed=7)
    resumed.load(tmp_path)
    train(resumed, [1, 2])
    assert resumed.policy_version == unbroken.policy_version == 9
    for model in ("policy", "reference"):
        theirs = dict(getattr(unbroken, model).module.named_parameters())
        for name, parameter in getattr(resumed, model).module.named_parameters():
            assert torch.equal(parameter, theirs[name]), (model, name)


def test_the_export_is_what_transformers_loads(tmp_path):
    config = trainer_config()
    learner = learner_for(config)
    learner.update(prepared(learner, config))
    learner.save_pretrained(tmp_path, tiny_tokenizer())
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, parameter in learner.policy.module.named_parameters():
        assert torch.equal(loaded[name], parameter)
    assert load_tokenizer(tmp_path).chat_template == tiny_tokenizer().chat_template
    assert list(tmp_path.glob("*.safetensors"))
