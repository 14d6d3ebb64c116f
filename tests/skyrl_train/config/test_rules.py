"""Rules: each one refuses with the key, the value and what to do."""

from __future__ import annotations

import sys

import pytest

from skyrl_train.config import POLICY_LOSSES, ConfigError, load_config


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def test_prompts_that_do_not_divide_are_explained_with_numbers():
    assert refusal("trainer.train_batch_size=10", "trainer.policy_mini_batch_size=4") == (
        "trainer.train_batch_size=10 prompts cannot be cut into mini batches of trainer.policy_mini_batch_size=4: "
        "10 = 2 x 4 + 2; nearest that work: 8 or 12\n"
        "This would start:\n  trainer.policy_mini_batch_size=4 trainer.train_batch_size=8"
    )


def test_a_mini_batch_is_not_larger_than_a_step():
    assert "set it to 8 or to a divisor of 8" in refusal("trainer.train_batch_size=8")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.epochs=0", "trainer.epochs=0 must be at least 1"),
        ("trainer.policy.optimizer_config.lr=nan", "trainer.policy.optimizer_config.lr=nan is not a number"),
        ("trainer.policy.optimizer_config.lr=inf", "trainer.policy.optimizer_config.lr=inf must be finite"),
        ("trainer.algorithm.entropy_loss_coef=inf", "trainer.algorithm.entropy_loss_coef=inf must be finite"),
        ("trainer.algorithm.eps_clip_low=nan", "trainer.algorithm.eps_clip_low=nan is not a number"),
        ("generator.sampling_params.temperature=nan", "generator.sampling_params.temperature=nan is not a number"),
        ("generator.sampling_params.temperature=1e-320", "must be 0 (greedy), or finite and at least 0.001"),
        ("generator.eval_sampling_params.temperature=inf", "must be 0 (greedy), or finite and at least 0.001"),
        ("generator.sampling_params.repetition_penalty=inf", "must be above 0 and finite"),
        ("trainer.micro_train_batch_size_per_gpu=0", "must be at least 1"),
        ("trainer.device=tpu", "trainer.device=tpu must be one of auto, cpu, cuda"),
        ("trainer.max_ckpts_to_keep=0", "would delete every checkpoint"),
        ("trainer.resume_mode=newest", "must be one of null, none, latest, from_path"),
        ("trainer.resume_mode=from_path", "needs a global_step_N folder"),
        ("trainer.resume_path=/c/global_step_3", "is only read with trainer.resume_mode=from_path"),
        ("trainer.ckpt_path=s3://bucket/x", "is not a local folder"),
        ("trainer.export_path=gs://bucket/x", "is not a local folder"),
        ("data.train_data=['s3://b/x.parquet']", "names the remote store"),
        ("data.train_data=[]", "data.train_data=[] is empty"),
        ("trainer.logger=print", "must be one of console, tensorboard"),
        ("trainer.logger=null", "must be one of console, tensorboard"),
        ("trainer.policy.optimizer_config.lr=-1", "trainer.policy.optimizer_config.lr=-1.0 must be at least 0"),
        ("trainer.policy.optimizer_config.adam_betas=[0.9]", "must be two numbers"),
        ("trainer.policy.optimizer_config.scheduler=step", "must be one of constant"),
        ("trainer.algorithm.policy_loss_type=ppo", "is not known; take one of cispo, clip_cov"),
        ("trainer.algorithm.policy_loss_type='my mod:f'", "is not known"),
        ("trainer.algorithm.advantage_estimator=ppo", "is not known; take one of distillation, gae, gdpo, gpg, grpo"),
        ("trainer.algorithm.kl_estimator_type=k4", "must be one of k1, k2, k3, abs"),
        ("trainer.algorithm.loss_reduction=mean", "must be one of token_mean"),
        ("trainer.algorithm.use_kl_in_reward=true", "add trainer.algorithm.use_kl_loss=false"),
        ("trainer.algorithm.kl_ctrl.horizon=0", "trainer.algorithm.kl_ctrl.horizon=0 must be at least 1"),
        ("generator.sampling_params.temperature=0", "is greedy"),
        ("generator.sampling_params.top_p=0", "generator.sampling_params.top_p=0.0 must be above 0"),
        ("generator.sampling_params.top_k=0", "must be -1 (off) or at least 1"),
        ("generator.sampling_params.min_p=1.5", "must be from 0 to 1"),
        ("generator.sampling_params.logprobs=5", "must be 0 or 1"),
        ("generator.sampling_params.logprobs=null", "must be 0 or 1"),
        ("generator.sampling_params.repetition_penalty=0", "must be above 0"),
        ("generator.sampling_params.stop=['']", "holds an empty string"),
        ("generator.sampling_params.min_tokens=2000", "from 0 to max_generate_length=1024"),
        ("generator.step_timeout_s=0", "must be above 0 seconds"),
        ("generator.chat_template.source=file", "needs a Jinja file"),
        ("generator.chat_template.name_or_path=qwen3_with_thinking", "is not a template known by name"),
        ("generator.n_samples_per_prompt=1", "gives grpo nothing to compare with"),
        ("environment.skyrl_gym.max_env_workers=-1", "environment.skyrl_gym.max_env_workers=-1 must be at least 0"),
        ("environment.env_class=''", "environment.env_class='' is empty"),
    ],
)
def test_a_wrong_value_is_refused_alone_and_in_words(override, says):
    text = refusal(override)
    assert says in text
    assert "problems in the configuration" not in text


def test_one_turn_reads_nothing_but_the_prompt():
    one_turn, two_turns = "generator.max_turns=1", "generator.max_turns=2"
    assert "must equal trainer.max_prompt_length=512" in refusal("generator.max_input_length=600", one_turn)
    assert "must equal trainer.max_prompt_length=512" in refusal("generator.max_input_length=500", one_turn)
    for turns in (two_turns, "generator.max_turns=null"):
        assert load_config(["generator.max_input_length=600", turns]).generator.max_input_length == 600
        assert "use at least 512" in refusal("generator.max_input_length=500", turns)


def test_batched_is_for_one_turn():
    assert load_config(["generator.batched=true"]).generator.batched
    overrides = ["generator.batched=true", "generator.max_turns=3"]
    assert refusal(*overrides).startswith("generator.batched=true plays one turn per prompt, but generator.max_turns=3")


def test_greedy_evaluation_is_fine():
    assert load_config([]).generator.eval_sampling_params.temperature == 0


def test_evaluation_without_data_is_no_error():
    assert load_config(["data.val_data=[]", "trainer.eval_interval=5"]).data.val_data == []


def test_a_loss_may_be_registered_or_named_by_its_import_path(monkeypatch):
    path = "trainer.algorithm.policy_loss_type=my_pkg.losses:clipped"
    assert load_config([path]).trainer.algorithm.policy_loss_type == "my_pkg.losses:clipped"
    monkeypatch.setattr("skyrl_train.config.algorithm.POLICY_LOSSES", POLICY_LOSSES | {"mine"})
    assert load_config(["trainer.algorithm.policy_loss_type=mine"]).trainer.algorithm.policy_loss_type == "mine"


def test_off_policy_correction_is_checked():
    section = "trainer.algorithm.off_policy_correction"
    assert "must be above 0" in refusal(f"{section}.tis_ratio_type=token", f"{section}.token_tis_ratio_clip_high=-1")
    assert "must be one of null, token, sequence" in refusal(f"{section}.tis_ratio_type=word")
    assert "takes no off-policy correction" in refusal(
        f"{section}.tis_ratio_type=token", "trainer.algorithm.policy_loss_type=kl_cov"
    )
    low, high = (f"{section}.token_mask_is_threshold_{side}" for side in ("low", "high"))
    assert "must be below token_mask_is_threshold_high=0.5" in refusal(f"{low}=0.5", f"{high}=0.5")
    assert load_config([f"{section}.outlier_token_is_threshold_low=0.1"]).trainer.algorithm.off_policy_correction.is_on


def test_a_tracker_without_its_key_or_package_is_refused(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", "no such file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else name)
    assert "needs WANDB_API_KEY" in refusal("trainer.logger=wandb")
    assert "needs the package mlflow" in refusal("trainer.logger=[console,mlflow]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert load_config(["trainer.logger=wandb"]).trainer.loggers == ["wandb"]


def test_exports_in_the_folder_of_the_checkpoints_are_refused():
    places = ("trainer.ckpt_path=/r", "trainer.export_path=/r/")
    assert "an export would replace a part of the checkpoint" in refusal(*places, "trainer.hf_save_interval=5")
    load_config(["data.train_data=['a.jsonl']", *places])  # without exports they do not meet


QUANTIZED = ["trainer.policy.model.load_in_4bit=true", "trainer.policy.model.lora.rank=16"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (QUANTIZED[:1], "freezes the model, and without adapters nothing is left to train; use lora.rank=16"),
        ([*QUANTIZED, "trainer.strategy=fsdp2"], "is not possible with trainer.strategy=fsdp2"),
        (["trainer.policy.optimizer_config.optim=adamw_8bit", "trainer.strategy=fsdp2"], "use trainer.strategy=single"),
        (["trainer.policy.optimizer_config.optim=adam8"], "must be one of adamw, adamw_8bit"),
        (["trainer.policy.optimizer_config.optim=paged_adamw_8bit"], "pages moments on GPUs alone.* use adamw_8bit"),
        (["trainer.critic.optimizer_config.optim=paged_adamw_32bit"], "pages moments on GPUs alone.* use adamw_8bit"),
    ],
)
def test_weights_and_moments_in_few_bits_are_refused_where_they_are_not_possible(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_config(overrides)


@pytest.mark.parametrize("overrides", [QUANTIZED, ["trainer.policy.optimizer_config.optim=adamw_8bit"]])
def test_without_bitsandbytes_they_are_refused_with_the_command_that_installs_it(overrides, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes: uv sync --inexact --extra quantized"):
        load_config(overrides)
