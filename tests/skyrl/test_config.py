"""Configuration as SkyRL's users give it: keys of their own, a root class, the renamed section, and what to paste."""

from __future__ import annotations

import copy
import json
import pickle
import shlex
import shutil
import sys
from dataclasses import dataclass, field

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from skyrl_train.cluster.placement import Resources, place
from skyrl_train.config import (
    AlgorithmConfig,
    BaseConfig,
    ConfigError,
    GeneratorConfig,
    SkyRLConfig,
    SkyRLTrainConfig,
    TrainerConfig,
    config_dir,
    get_config_as_dict,
    get_config_as_yaml_str,
    load_config,
    make_config,
    to_flat_dict,
    validate_cfg,
)
from skyrl_train.config.problems import written
from skyrl_train.console import as_typed
from skyrl_train.engine.vllm.settings import refuse_what_vllm_cannot

OPENENV_LAUNCH = [
    "data.train_data=['/d/train.parquet']", "data.val_data=['/d/validation.parquet']",
    "trainer.algorithm.advantage_estimator=grpo", "trainer.policy.model.path=Qwen/Qwen2.5-1.5B-Instruct",
    "trainer.placement.colocate_all=true", "trainer.strategy=fsdp", "trainer.placement.policy_num_gpus_per_node=4",
    "trainer.placement.critic_num_gpus_per_node=4", "trainer.placement.ref_num_gpus_per_node=4",
    "generator.inference_engine.num_engines=4", "generator.inference_engine.tensor_parallel_size=1",
    "trainer.epochs=20", "trainer.eval_batch_size=4", "trainer.eval_before_train=true", "trainer.eval_interval=5",
    "trainer.update_epochs_per_batch=1", "trainer.train_batch_size=4", "trainer.policy_mini_batch_size=4",
    "trainer.micro_forward_batch_size_per_gpu=4", "trainer.micro_train_batch_size_per_gpu=4",
    "trainer.ckpt_interval=10", "trainer.max_prompt_length=512", "generator.sampling_params.max_generate_length=1024",
    "generator.sampling_params.temperature=0.6", "generator.sampling_params.top_p=0.95",
    'generator.sampling_params.stop=["</action>"]', 'generator.eval_sampling_params.stop=["</action>"]',
    "generator.eval_sampling_params.max_generate_length=1024", "trainer.policy.optimizer_config.lr=1.0e-6",
    "trainer.algorithm.use_kl_loss=true", "generator.max_turns=1", "generator.inference_engine.backend=vllm",
    "generator.inference_engine.run_engines_locally=true", "generator.inference_engine.weight_sync_backend=nccl",
    "generator.batched=false", "environment.env_class=openenv", "generator.use_conversation_multi_turn=false",
    "generator.n_samples_per_prompt=4", "generator.inference_engine.gpu_memory_utilization=0.8",
    "trainer.logger=console", "trainer.project_name=openenv", "trainer.run_name=openenv_echo_env_latest",
    "trainer.resume_mode=latest", "trainer.ckpt_path=/c", "trainer.dump_data_batch=true",
]  # fmt: skip
OVERLONG = ["+trainer.algorithm.overlong_buffer.len=512", "+trainer.algorithm.overlong_buffer.penalty_factor=1.0"]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def to_paste(*overrides: str) -> list[str]:
    text = refusal(*overrides)
    before, _, command = text.partition("\nThis would start:\n")
    assert before, text
    return shlex.split(command)


def test_own_keys_are_read_as_attributes_and_as_items():
    config = load_config(
        [*OVERLONG, "+my.deep={a: [1, 2], b: {c: x}}", "+generator.miniswe_config_path=/x", "++my.k=3"]
    )
    assert config.trainer.algorithm.overlong_buffer.len == 512
    assert config.trainer.algorithm["overlong_buffer"]["penalty_factor"] == 1.0
    assert (config["my"].deep.b.c, config["my"].k, config.my.deep["a"]) == ("x", 3, [1, 2])
    assert config.generator.get("miniswe_config_path") == "/x"
    assert config.generator.get("nothing", 7) == 7
    assert "my" in config
    assert OmegaConf.to_container(config.my, resolve=True) == {"deep": {"a": [1, 2], "b": {"c": "x"}}, "k": 3}
    with pytest.raises(AttributeError):
        _ = config.my.nothing
    json.dumps(to_flat_dict(config))
    flat = to_flat_dict(config)
    assert flat["trainer.algorithm.overlong_buffer.len"] == 512
    assert flat["my.deep.b.c"] == "x"
    assert to_flat_dict(validate_cfg(config)) == flat
    assert "overlong_buffer" in get_config_as_yaml_str(config)
    assert get_config_as_dict(config)["generator"]["miniswe_config_path"] == "/x"


def test_a_key_that_follows_another_one_is_read_with_its_value():
    """SkyRL's Harbor generator reads the name of the engine's model."""
    config = load_config(["trainer.policy.model.path=/m"])
    for copied in (config, copy.deepcopy(config), validate_cfg(config), pickle.loads(pickle.dumps(config))):
        assert copied.generator.get("model_name") == getattr(copied.generator, "model_name") == "/m"  # noqa: B009
        assert copied.generator.get("rope_theta", 3) is None
        assert "generator.model_name" not in to_flat_dict(copied)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("+trainer.epoch=2", "trainer.epochs"),
        ("+trainr.epochs=2", "trainer.epochs"),
        ("+generator.temperature=0.5", "generator.sampling_params.temperature"),
        ("+lr=3", "trainer.policy.optimizer_config.lr"),
        ("+trainer.algorithm.eps_clip_hgih=0.3", "trainer.algorithm.eps_clip_high"),
    ],
)
def test_a_plus_does_not_hide_a_slip_of_the_pen(override, meant):
    text = refusal(override)
    assert f"looks like {meant}" in text
    assert "of its own: +my." in text


def test_a_key_of_ones_own_may_resemble_one_of_ours():
    """SkyRL's full_context example has the first."""
    assert load_config(["+trainer.num_dummy_steps=5"]).trainer["num_dummy_steps"] == 5


@pytest.mark.parametrize("override", ["+trainer.rules.x=1", "+generator.get=1", "+trainer.problems=2", "+my-key.x=1"])
def test_a_key_that_would_hide_something_is_refused(override):
    assert "is no free name" in refusal(override)


@pytest.mark.parametrize("override", ["+trainer.policy.megatron_config.x=1", "+trainer.critic.model.path=y"])
def test_a_plus_does_not_make_a_refused_key_ones_own(override):
    text = refusal(override)
    assert any(way_out in text for way_out in ("drop it", "use "))


def test_what_hydra_composed_keeps_own_keys_and_their_types_are_checked():
    with initialize_config_dir(config_dir, version_base=None):
        composed = compose("ppo_base_config", overrides=[*OVERLONG, "+my.key=1", "trainer.epochs=2"])
        wrong = compose("ppo_base_config", overrides=["trainer.epochs=many"])
    assert composed.generator.max_input_length == 512
    config = validate_cfg(composed)
    assert (config.trainer.epochs, config["my"].key, config.trainer.algorithm["overlong_buffer"].len) == (2, 1, 512)
    with pytest.raises(ConfigError, match=r"trainer.epochs=many has the wrong type"):
        validate_cfg(wrong)


def test_a_hand_made_tree_may_not_hold_a_slip_either():
    with pytest.raises(ConfigError, match=r"looks like trainer.epochs"):
        validate_cfg(OmegaConf.create({"trainer": {"epoch": 2}}))
    with pytest.raises(ConfigError, match="is not a key of the configuration"):
        SkyRLConfig.from_dict_config(OmegaConf.create({"my": {"key": 2}}))


@dataclass
class Buffer(BaseConfig):
    length: int = 512
    factor: float = 1.0


@dataclass
class DAPOAlgorithmConfig(AlgorithmConfig):
    overlong_buffer_len: int = 512
    buffer: Buffer = field(default_factory=Buffer)
    sizes: list[int] = field(default_factory=lambda: [1])


@dataclass
class MyGenerator(GeneratorConfig):
    traj_dir: str = "/tmp/t"


@dataclass
class MyTrainer(TrainerConfig):
    patience: int = 3


def test_a_root_class_of_ones_own_is_made_as_the_newest_skyrl_makes_it():
    root = make_config(algorithm_cls=DAPOAlgorithmConfig, generator_cls=MyGenerator)
    config = root.from_cli_overrides(
        ["trainer.algorithm.overlong_buffer_len=7", "trainer.algorithm.buffer.factor=2", "generator.traj_dir=/x"]
    )
    assert isinstance(config, SkyRLTrainConfig)
    assert isinstance(config.trainer.algorithm, DAPOAlgorithmConfig)
    assert (config.trainer.algorithm.overlong_buffer_len, config.trainer.algorithm.buffer.factor) == (7, 2.0)
    assert config.generator.get("traj_dir") == "/x"
    assert make_config(trainer_cls=MyTrainer).from_cli_overrides({"trainer.patience": 4}).trainer["patience"] == 4
    with pytest.raises(ConfigError, match=r"trainer.algorithm.overlong_buffer_len=x has the wrong type"):
        root.from_cli_overrides({"trainer.algorithm.overlong_buffer_len": "x"})
    with pytest.raises(ConfigError, match=r"trainer.algorithm.sizes=x has the wrong type: expected a list"):
        root.from_cli_overrides({"trainer.algorithm.sizes": "x"})


def test_overrides_may_be_a_dictionary():
    config = SkyRLTrainConfig.from_cli_overrides(
        {"trainer.run_name": "it's a test", "data.train_data": ["a b.jsonl"], "trainer.resume_mode": None}
    )
    assert (config.trainer.run_name, config.data.train_data) == ("it's a test", ["a b.jsonl"])
    assert config.trainer.resume_mode is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_engines=0", "generator.num_inference_engines=0"),
        ("tensor_parallel_size=4", "generator.inference_engine_tensor_parallel_size=4"),
        ("pipeline_parallel_size=4", "generator.inference_engine_pipeline_parallel_size=4"),
        ("remote_urls=[a]", "generator.remote_inference_engine_urls=[a]"),
        ("backend=sglang", "generator.backend=sglang"),
        ("gpu_memory_utilization=0.5", "generator.gpu_memory_utilization=0.5"),
        ("engine_init_kwargs.max_model_len=9", "generator.engine_init_kwargs={max_model_len:9}"),
    ],
)
def test_the_renamed_section_is_refused_as_the_old_one_is(theirs, ours):
    assert refusal(f"generator.inference_engine.{theirs}").startswith(ours)


def test_the_renamed_section_is_understood():
    section = "generator.inference_engine"
    config = load_config([f"{section}.max_num_seqs=8", f"{section}.num_engines=1", f"{section}.backend=torch"])
    assert config.generator.max_num_seqs == 8
    assert load_config([f"{section}={{max_num_seqs: 9, num_engines: 1}}"]).generator.max_num_seqs == 9
    assert "is for vLLM" in refusal(f"{section}.distributed_executor_backend=ray")


def test_a_launch_command_of_skyrl_ends_with_one_that_starts():
    typed = [
        "data.train_data=['/d/train.parquet']",
        "trainer.algorithm.advantage_estimator=grpo",
        "trainer.policy.model.path=Qwen/Qwen2.5-1.5B-Instruct",
        "trainer.placement.colocate_all=false",
        "trainer.strategy=fsdp2",
        "trainer.placement.policy_num_gpus_per_node=4",
        "generator.inference_engine.num_engines=4",
        "generator.inference_engine.backend=vllm",
        "generator.num_inference_engines=4",
        "generator.gpu_memory_utilization=0.85",
        "trainer.epochs=20",
        "trainer.train_batch_size=1024",
        "trainer.policy_mini_batch_size=256",
        "trainer.flash_attn=true",
        "+trainer.algorithm.overlong_buffer.len=512",
        "trainer.run_name='a run'",
    ]
    pasted = to_paste(*typed)
    assert pasted == [text for text in typed if "flash_attn" not in text]
    assert load_config(pasted).trainer.algorithm["overlong_buffer"].len == 512


@pytest.mark.parametrize(
    ("typed", "pasted"),
    [
        (["trainer.epoch=2", "trainer.seed=1"], ["trainer.seed=1", "trainer.epochs=2"]),
        (["trainer.train_batch_size=8"], ["trainer.train_batch_size=8", "trainer.policy_mini_batch_size=8"]),
        (
            ["trainer.algorithm.use_kl_in_reward=true"],
            ["trainer.algorithm.use_kl_in_reward=true", "trainer.algorithm.use_kl_loss=false"],
        ),
        (
            ["trainer.algorithm.use_tis=true", "trainer.algorithm.tis_imp_ratio_cap=3.0"],
            [
                "trainer.algorithm.off_policy_correction.tis_ratio_type=token",
                "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high=3.0",
            ],
        ),
        (["trainer.epochs=0", "trainer.seed=x", "trainer.seed=5"], []),
        (["trainer.seed=7", "--help", "trainer.run_name=[1"], ["trainer.seed=7", "trainer.run_name='[1'"]),
        # what the message says is dropped, and not the algorithm that was asked for
        (
            ["trainer.algorithm.advantage_estimator=gae", "trainer.policy.model.path=/m"],
            [
                "trainer.algorithm.advantage_estimator=gae",
                "trainer.policy.model.path=/m",
                "trainer.critic.model.path=/m",
            ],
        ),
        (
            [
                "trainer.algorithm.policy_loss_type=rollout_is",
                "trainer.algorithm.off_policy_correction.tis_ratio_type=token",
                "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high=3.0",
            ],
            ["trainer.algorithm.policy_loss_type=rollout_is"],
        ),
        (
            ["generator.step_wise_trajectories=true", "generator.batched=true"],
            ["generator.step_wise_trajectories=true"],
        ),
        (["trainer.seed=1", "generator.chat_template.source=file"], ["trainer.seed=1"]),
        (["trainer.seed=1", "trainer.resume_mode=from_path"], ["trainer.seed=1"]),
        # the choice that was probably meant
        (["trainer.algorithm.loss_reduction=token_mean_legacy"], ["trainer.algorithm.loss_reduction=token_mean"]),
        (["trainer.algorithm.policy_loss_type=gsp"], ["trainer.algorithm.policy_loss_type=gspo"]),
        (["trainer.logger=[wandb,console]"], ["trainer.logger=[console]"]),
        # what other parsers read
        (["--trainer.seed=3"], ["trainer.seed=3"]),
        (["data.train_data=/a b.parquet"], ["data.train_data=['/a b.parquet']"]),
        (["data.val_data=/a.parquet,/b.parquet"], ["data.val_data=[/a.parquet,/b.parquet]"]),
        (["+my.name=a(b", "trainer.flash_attn=true"], ["+my.name='a(b'"]),
        # one item of a mapping, and a key below a section that was set as a whole
        (["trainer={seed: 3, flash_attn: true, logger: 'a b'}"], ["trainer.seed=3"]),
        (["trainer.policy.model.path=/m", "trainer.policy=x"], ["trainer.policy.model.path=/m"]),
        (
            [
                "generator.inference_engine={num_engines: 2, no_such: 1}",
                "generator.inference_engine.async_engine=false",
            ],
            ["generator.inference_engine.num_engines=2"],
        ),
        (["generator.inference_engine.engine_init_kwargs=(", "trainer.seed=3"], ["trainer.seed=3"]),
        # keys in sections of the user's own
        (
            ["harbor.trials_dir=/x", "generator.rate_limit.on=true"],
            ["+harbor.trials_dir=/x", "+generator.rate_limit.on=true"],
        ),
        (["trainer.arctic_rl.log_prob_gpus=3"], ["+trainer.arctic_rl.log_prob_gpus=3"]),
        (["model.path=/m"], ["trainer.policy.model.path=/m"]),
        (["trainer.run_nam='my run'", "trainer.seed=7"], ["trainer.seed=7", "trainer.run_name='my run'"]),
        (
            ["trainer.seed=7", "trainer.algorithm.policy_loss_type=regular", "trainer.algorithm.clip_ratio_c=2.0"],
            ["trainer.seed=7", "trainer.algorithm.policy_loss_type=regular"],
        ),
    ],
)
def test_what_is_pasted_is_accepted(typed, pasted, monkeypatch):
    monkeypatch.setattr("skyrl_train.config.validation.has_wandb_key", lambda: False)
    if pasted:
        assert to_paste(*typed) == pasted
        load_config(pasted)
    else:
        assert "This would start" not in refusal(*typed)


def test_where_nothing_is_left_to_say_the_program_alone_starts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "data.train_data=[]"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "main.py", "data.train_data=[]"])
    assert refusal("data.train_data=[]").splitlines()[-1] == "  python main.py"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (
            '{"gdn_prefill_backend": "triton", "deep": {"a": [1, null]}}',
            {"gdn_prefill_backend": "triton", "deep": {"a": [1, None]}},
        ),
        ("{enforce: true}", {"enforce": True}),
    ],
)
def test_a_mapping_may_be_written_as_json_as_in_the_newest_skyrl(value, read):
    overrides = ["generator.backend=vllm", f"generator.inference_engine.engine_init_kwargs={value}"]
    assert load_config(overrides).generator.engine_init_kwargs == read
    assert load_config(["+my.list=[\"a(\", 'b: {c']"])["my"].list == ["a(", "b: {c"]


def test_a_setting_is_read_as_it_was_written():
    settings = {"my.a": ["a,b", "it's", "x y", 3], "my.b": {"c": "d: {e", "f": None}, "my.g": ""}
    read = load_config([written(f"+{key}", value) for key, value in settings.items()])
    assert OmegaConf.to_container(read["my"], resolve=True) == {"a": settings["my.a"], "b": settings["my.b"], "g": ""}


def test_the_command_is_the_one_of_this_process(monkeypatch):
    typed = ["trainer.flash_attn=true", "trainer.run_name='a b'"]
    monkeypatch.setattr(sys, "argv", ["main.py", *typed])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "my.main", *typed])
    assert refusal(*typed).splitlines()[-1] == """  python -m my.main "trainer.run_name='a b'\""""
    with initialize_config_dir(config_dir, version_base=None):
        composed = compose("ppo_base_config", overrides=typed)
    with pytest.raises(ConfigError, match=r"This would start:\n  python -m my.main"):
        validate_cfg(composed)


def test_the_script_skyrl_is_called_as_it_is_typed(monkeypatch):
    for on_path, begin in (("/venv/bin/skyrl", as_typed("skyrl")), (None, "/venv/bin/skyrl")):
        monkeypatch.setattr(shutil, "which", lambda name, found=on_path: found)
        monkeypatch.setattr(sys, "argv", ["/venv/bin/skyrl", "train", "trainer.epoch=2"])
        monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python", "/venv/bin/skyrl", "train", "trainer.epoch=2"])
        assert refusal("trainer.epoch=2").splitlines()[-1] == f"  {begin} train trainer.epochs=2"


def test_the_launch_command_of_skyrls_openenv_integration_is_accepted_as_it_is():
    """The keys and values of its run_openenv.sh with NUM_GPUS=4; "console" stands for its wandb, which needs a key."""
    from integrations.openenv.entrypoints.main_openenv import OpenEnvRunConfig

    config = load_config(OPENENV_LAUNCH, OpenEnvRunConfig)
    trainer, generator = config.trainer, config.generator
    refuse_what_vllm_cannot(config)
    assert len(OPENENV_LAUNCH) == 45
    assert (trainer.strategy, trainer.placement.num_ranks, generator.num_inference_engines) == ("fsdp", 4, 4)
    assert (generator.backend, generator.gpu_memory_utilization, trainer.dump_data_batch) == ("vllm", 0.8, True)
    four, one = (Resources(num_gpus=count, num_cores=8) for count in (4, 1))
    assert place(config, four, on_gpu=True).sharing() == {i: [f"rank {i}", f"engine {i}"] for i in range(4)}
    with pytest.raises(ValueError, match=r"4 GPUs are needed \(4 for the policy\), and 1 are here"):
        place(config, one, on_gpu=True)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["trainer.placement.policy_num_gpus_per_node=2"],
            "trainer.strategy=single is one learner, but the placement asks for 2 ranks; use trainer.strategy=fsdp2",
        ),
        (["trainer.strategy=megatron"], "use trainer.strategy=fsdp2"),
        (["trainer.policy.fsdp_config.cpu_offload=true"], "has no effect with trainer.strategy=single"),
        (["trainer.placement.policy_num_nodes=2"], "but the placement asks for 2 ranks; use trainer.strategy=fsdp2"),
        (
            ["trainer.strategy=fsdp2", "trainer.placement.policy_num_gpus_per_node=2",
             "trainer.placement.ref_num_gpus_per_node=1"],
            "trainer.placement.ref_num_gpus_per_node=1 cannot differ from "
            "trainer.placement.policy_num_gpus_per_node=2: the reference policy lies on the devices of the policy",
        ),
        (
            ["generator.weight_sync_backend=gloo", "trainer.placement.colocate_all=false", "trainer.device=cuda"],
            "generator.weight_sync_backend=gloo is for processes on a CPU; use nccl, or trainer.device=cpu",
        ),
        (
            ["generator.weight_sync_backend=gloo"],
            "has no effect where learner and engine are one process, which shares them; drop it",
        ),
        (
            ["generator.weight_sync_backend=broadcast"],
            "is not a way of new weights to the engines; use shared_memory, nccl or gloo",
        ),
        (
            ["generator.weight_sync_backend=gloo", "trainer.strategy=fsdp2", "trainer.placement.policy_num_nodes=2",
             "generator.num_inference_engines=2"],
            "generator.weight_sync_backend=gloo joins processes of one machine; use shared_memory",
        ),
        (["generator.backend=vllm", "generator.gpu_memory_utilization=1.5"], "must be above 0 and at most 1"),
        (["generator.enforce_eager=false"], "has no effect with generator.backend=torch; drop it, or set generator.ba"),
    ],
)  # fmt: skip
def test_a_placement_that_cannot_be_is_refused(overrides, says):
    assert says in refusal(*overrides)


def test_a_root_class_of_ones_own_reaches_a_ray_task():
    from ray import cloudpickle

    root = make_config(algorithm_cls=DAPOAlgorithmConfig)
    config = root.from_cli_overrides(["trainer.algorithm.overlong_buffer_len=7", "+my.key=1"])
    arrived = cloudpickle.loads(cloudpickle.dumps(config))
    assert to_flat_dict(arrived) == to_flat_dict(config)
    assert to_flat_dict(validate_cfg(arrived))["trainer.algorithm.overlong_buffer_len"] == 7
