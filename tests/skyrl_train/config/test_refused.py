"""No silent no-ops: a key that nothing reads may only keep its default."""

from __future__ import annotations

import pytest

from skyrl_train.config import ConfigError, SkyRLConfig, load_config
from skyrl_train.config.conditions import ACTS_ONLY_WITH
from skyrl_train.config.refused import NEWEST, REFUSED, lies_in, reason_against
from skyrl_train.config.refused_rows import ROWS
from skyrl_train.config.tree import leaves

KEYS = [key for key, _ in leaves(SkyRLConfig())]
NOT_IN_THE_TABLE = {
    "hydra", "trainer.policy.megatron_config", "trainer.ref.megatron_config", "generator.sampling_params.seed",
    "generator.eval_sampling_params.seed", "generator.sampling_params.additional_kwargs",
    "generator.eval_sampling_params.additional_kwargs", "generator.inference_engine",
    "trainer.remove_microbatch_padding", *NEWEST,
}  # fmt: skip


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.strategy=megatron",
        "generator.backend=sglang",
        "trainer.placement.policy_num_gpus_per_node=2",
        "trainer.placement.policy_num_nodes=2",
        "trainer.placement.colocate_policy_ref=false",
        "trainer.placement.ref_num_gpus_per_node=2",
        "trainer.placement.critic_num_gpus_per_node=2",
        "trainer.ref.model.lora.rank=8",
        "trainer.critic.fsdp_config.cpu_offload=true",
        "trainer.critic.model.path=gpt2",
        "trainer.critic_mini_batch_size=8",
        "trainer.algorithm.lambd=0.9",
        "trainer.algorithm.value_head_prefix=head",
        "trainer.algorithm.advantage_estimator=gae",
        "trainer.fully_async.max_staleness_steps=2",
        "trainer.policy.fsdp_config.fsdp_size=2",
        "trainer.ref.fsdp_config.cpu_offload=true",
        "trainer.policy.sequence_parallel_size=2",
        "trainer.policy.megatron_config.tensor_model_parallel_size=2",
        "trainer.algorithm.use_tis=true",
        "trainer.flash_attn=true",
        "trainer.use_sample_packing=false",
        "trainer.rope_theta=10000.0",
        "generator.weight_sync_backend=gloo",
        "generator.enforce_eager=false",
        "generator.enable_prefix_caching=false",
        "generator.run_engines_locally=false",
        "generator.inference_engine_tensor_parallel_size=2",
        "generator.inference_engine_data_parallel_size=2",
        "generator.gpu_memory_utilization=0.7",
        "generator.async_engine=false",
        "generator.model_dtype=bfloat16",
        "generator.engine_init_kwargs={max_model_len:100}",
        "generator.sampling_params.seed=1",
        "hydra.run.dir=x",
    ],
)
def test_what_does_not_work_yet_is_refused_with_key_value_and_way_out(setting):
    text = refusal(f"+{setting}")
    assert setting.partition("=")[0] in text
    assert any(way_out in text for way_out in ("drop it", "use "))
    assert "problems in the configuration" not in text


def test_the_default_of_a_refused_key_is_accepted():
    load_config(
        [
            "trainer.strategy=single",
            "generator.backend=torch",
            "trainer.placement.colocate_all=true",
            "generator.num_inference_engines=1",
            "trainer.policy.model.path=other",
            "generator.model_name=other",
            "generator.weight_sync_backend=nccl",
        ]
    )


def test_a_key_that_follows_another_must_not_leave_it():
    assert "generator.model_name=mine is not read" in refusal("generator.model_name=mine")


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        ("trainer.algorithm.entropy_loss_coef=0.1", "set trainer.algorithm.use_entropy_loss=true"),
        ("trainer.algorithm.sapo.tau_pos=2.0", "set trainer.algorithm.policy_loss_type=sapo"),
        ("trainer.algorithm.clip_ratio_c=10.0", "set trainer.algorithm.policy_loss_type=dual_clip"),
        ("trainer.algorithm.kl_ctrl.type=adaptive", "set trainer.algorithm.use_kl_in_reward=true"),
        ("trainer.algorithm.max_seq_len=9", "set trainer.algorithm.loss_reduction=seq_mean_token_sum_norm"),
    ],
)
def test_a_key_that_needs_another_is_refused_alone_and_accepted_beside_it(setting, needed):
    text = refusal(setting)
    assert text.startswith(f"{setting} has no effect with ")
    assert text.endswith(f"drop it, or {needed}")
    extra = ["trainer.algorithm.use_kl_loss=false"] if "use_kl_in_reward" in needed else []
    load_config([setting, needed.removeprefix("set "), *extra])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rank=-1", "rank=-1 must be at least 0"),
        ("alpha=0", "alpha=0 must be at least 1"),
        ("dropout=0.1", "dropout=0.1 is not possible: the engine samples without dropout"),
        ("target_modules=[]", "target_modules=[] must be all-linear or names of modules"),
        ("exclude_modules=[1]", "exclude_modules=[1] must be names of modules"),
        ("init_method=zero", "init_method=zero must be one of kaiming, xavier, normal"),
        ("lora_sync_path=/x", "lora_sync_path=/x has nothing to do: an engine reads the learner's weights"),
    ],
)
def test_adapters_that_cannot_be_are_refused(setting, says):
    adapters = "trainer.policy.model.lora"
    assert refusal(f"{adapters}.rank=8", f"{adapters}.{setting}").startswith(f"{adapters}.{says}")


def test_adapter_keys_need_a_rank_and_a_reference_that_is_to_follow_needs_the_same_base():
    alpha, rank = "trainer.policy.model.lora.alpha=32", "trainer.policy.model.lora.rank=8"
    assert "alpha=32 has no effect with rank=0; drop it, or use adapters with rank=16" in refusal(alpha)
    load_config([alpha, rank])
    follow = "trainer.update_ref_every_epoch=true"
    load_config([rank, follow])
    load_config([rank, "trainer.ref.model.path=other"])
    assert "drop trainer.ref.model.path" in refusal(rank, follow, "trainer.ref.model.path=other")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("len=2000", "len=2000 is more than a reply can have"),
        ("len=-1", "len=-1 must be at least 0"),
        ("factor=2", "factor=2.0 has no effect with overlong_penalty.len=0"),
        ("factor=0", "factor=0.0 is taken from the reward, so it must be above 0"),
    ],
)
def test_a_length_penalty_that_cannot_be_is_refused(setting, says):
    assert f"trainer.algorithm.overlong_penalty.{says}" in refusal(f"trainer.algorithm.overlong_penalty.{setting}")
    load_config(["+trainer.algorithm.overlong_penalty.len=512", "+trainer.algorithm.overlong_penalty.factor=2.0"])


GAE = "trainer.algorithm.advantage_estimator=gae"
ONE = "generator.n_samples_per_prompt=1"


def test_a_discount_needs_an_estimator_that_has_time_steps():
    gamma = "trainer.algorithm.gamma=0.9"
    assert "set trainer.algorithm.advantage_estimator=reinforce++|gae" in refusal(gamma)
    load_config([gamma, "trainer.algorithm.advantage_estimator=reinforce++"])


DISTILLATION = "trainer.algorithm.advantage_estimator=distillation"
NO_KL = "trainer.algorithm.use_kl_loss=false"
TEACHER = "trainer.ref.model.path=other"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([DISTILLATION, TEACHER], "measures the policy against the teacher already"),
        ([DISTILLATION, NO_KL], "advantage_estimator=distillation needs a teacher"),
        ([NO_KL, TEACHER], "trainer.ref.model.path=other has no effect with"),
        (
            [NO_KL, TEACHER, "trainer.algorithm.advantage_estimator=my.mod:fn"],
            "trainer.ref.model.path=other has no eff",
        ),
        (["trainer.algorithm.distillation.reward_weight=1"], "reward_weight=1.0 has no effect with"),
        (
            [DISTILLATION, NO_KL, TEACHER, "trainer.algorithm.distillation.reward_weight=1", ONE],
            "generator.n_samples_per_prompt=1 gives grpo nothing to compare with",
        ),
    ],
)
def test_a_distillation_that_cannot_be_is_refused(settings, says):
    assert says in refusal(*settings)
    load_config([DISTILLATION, NO_KL, TEACHER, ONE])
    load_config([DISTILLATION, NO_KL, TEACHER, "trainer.algorithm.distillation.reward_weight=1"])


def test_a_distillation_without_a_teacher_is_not_corrected_to_a_run_that_learns_from_rewards():
    with pytest.raises(ConfigError) as caught:
        load_config([DISTILLATION])
    assert "This would start" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([GAE], "advantage_estimator=gae compares with the values of a critic, and there is none"),
        (
            [GAE, "trainer.critic.model.path=m", "trainer.critic.shares_policy=true"],
            "trainer.critic.model.path=m is not read with trainer.critic.shares_policy=true",
        ),
        (
            [GAE, "trainer.critic.model.lora.rank=8", "trainer.critic.shares_policy=true"],
            "trainer.critic.model.lora.rank=8 has no trunk to adapt",
        ),
        (
            [GAE, "trainer.critic.model_config_kwargs={a:1}", "trainer.critic.shares_policy=true"],
            "trainer.critic.model_config_kwargs={a:1} has no model to change",
        ),
        ([GAE, "trainer.critic.model.path=m", "trainer.algorithm.value_clip=0"], "value_clip=0.0 must be above 0"),
        ([GAE, "trainer.critic.model.path=m", "trainer.algorithm.lambd=1.1"], "lambd=1.1 must be from 0 to 1"),
    ],
)
def test_a_critic_that_cannot_be_is_refused(settings, says):
    assert says in refusal(*settings)


def test_a_critic_is_accepted_with_everything_that_it_reads():
    critic = "trainer.critic."
    own = [f"{critic}model.path=m", f"{critic}model.lora.rank=8", f"{critic}model_config_kwargs={{a:1}}"]
    settings = ["trainer.critic_mini_batch_size=8", f"{critic}optimizer_config.lr=1e-4", "trainer.algorithm.lambd=0.9"]
    clip = ["trainer.algorithm.value_clip=null", "trainer.algorithm.gamma=0.9"]
    load_config([GAE, *own, *settings, *clip, "trainer.strategy=fsdp2"])
    shared = [GAE, f"{critic}shares_policy=true", *settings, *clip]
    load_config([*shared, "trainer.strategy=fsdp2", "generator.n_samples_per_prompt=1"])


def test_kl_keys_need_a_kl_term():
    off = "trainer.algorithm.use_kl_loss=false"
    text = refusal("trainer.algorithm.kl_loss_coef=0.1", off)
    assert "set trainer.algorithm.use_kl_loss=true or trainer.algorithm.use_kl_in_reward=true\n" in text
    load_config(["trainer.algorithm.kl_loss_coef=0.1", off, "trainer.algorithm.use_kl_in_reward=true"])


def test_a_function_of_the_users_may_read_any_key():
    load_config(["trainer.algorithm.sapo.tau_pos=2.0", "trainer.algorithm.policy_loss_type=my.mod:loss"])


def test_no_refused_key_is_a_field_and_each_has_one_reason():
    assert [key for key in KEYS if reason_against(key) is not None] == []
    assert [key for key in ROWS if sum(lies_in(key, prefix) for prefix in REFUSED) != 1] == []


def test_every_entry_of_the_tables_is_about_a_key():
    for prefix in REFUSED:
        assert any(lies_in(key, prefix) for key in ROWS) != (prefix in NOT_IN_THE_TABLE), prefix
    for prefix in ACTS_ONLY_WITH:
        assert any(lies_in(key, prefix) for key in KEYS), prefix


def test_every_condition_names_keys_of_the_tree():
    for condition in ACTS_ONLY_WITH.values():
        assert set(condition) <= set(KEYS)
