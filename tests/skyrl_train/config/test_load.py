"""Loading of the command line into the typed configuration, and every error in that."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from skyrl_train.config import ConfigError, SkyRLConfig, load_config, validate_cfg
from skyrl_train.config.generator import GeneratorConfig, SamplingConfig
from skyrl_train.config.synonyms import SYNONYMS, squeezed
from skyrl_train.config.tree import leaves


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return [str(problem) for problem in caught.value.problems]


def problem(*overrides: str) -> str:
    [only] = problems(*overrides)
    return only


def test_defaults_are_a_valid_run_of_one_process():
    config = load_config([])
    assert (config.trainer.strategy, config.trainer.device, config.generator.backend) == ("single", "auto", "torch")
    assert config.trainer.bf16 is None
    assert config.generator.sampling_params.logprobs == 1


def test_overrides_are_typed():
    config = load_config(
        [
            "trainer.policy.optimizer_config.lr=1e-5",
            "trainer.eval_interval=-1",
            "generator.sampling_params.stop=['</action>','</answer>']",
            "trainer.bf16=false",
            "trainer.resume_mode=null",
            "trainer.logger=[console,tensorboard]",
            "generator.chat_template_kwargs={enable_thinking: false}",
        ]
    )
    assert config.trainer.policy.optimizer_config.lr == 1e-5
    assert config.generator.sampling_params.stop == ["</action>", "</answer>"]
    assert config.trainer.bf16 is False
    assert config.trainer.resume_mode is None
    assert config.trainer.loggers == ["console", "tensorboard"]
    assert config.generator.chat_template_kwargs == {"enable_thinking": False}


def test_values_that_follow_others_follow_them():
    config = load_config(
        [
            "trainer.policy.model.path=/m",
            "trainer.max_prompt_length=64",
            "generator.sampling_params.max_generate_length=7",
        ]
    )
    assert config.trainer.ref.model.path == "/m"
    assert config.generator.max_input_length == 64
    assert config.generator.eval_sampling_params.max_generate_length == 7


def test_a_home_folder_is_written_out():
    home = os.path.expanduser("~")
    config = load_config(["data.val_data=['~/v.parquet']"])
    assert config.trainer.ckpt_path == f"{home}/ckpts/"
    assert config.data.val_data == [f"{home}/v.parquet"]
    assert config.data.train_data == [f"{home}/data/gsm8k/train.parquet"]


def test_a_plus_before_a_known_key_is_the_key():
    assert load_config(["+trainer.epochs=3", "++trainer.seed=1"]).trainer.epochs == 3


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trainer.epoch", "trainer.epochs"),
        ("generator.temperature", "generator.sampling_params.temperature"),
        ("generator.sampling_params.temprature", "generator.sampling_params.temperature"),
        ("lr", "trainer.policy.optimizer_config.lr"),
        ("generator.train_batch_size", "trainer.train_batch_size"),
        ("trainer.n_samples_per_prompt", "generator.n_samples_per_prompt"),
        ("trainer.policy.optimizer_config.learning_rat.lr", "trainer.policy.optimizer_config.lr"),
        ("trainer.epochs.more", "trainer.epochs"),
    ],
)
def test_an_unknown_key_is_told_the_one_that_was_meant(key, meant):
    text = problem(f"{key}=1")
    assert text.startswith(f"{key} is not a key of the configuration; did you mean {meant}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("batch_size", "trainer.train_batch_size"),
        ("trainer.batch_size", "trainer.train_batch_size"),
        ("learning_rate", "trainer.policy.optimizer_config.lr"),
        ("trainer.policy.optimizer.learning-rate", "trainer.policy.optimizer_config.lr"),
        ("num_samples", "generator.n_samples_per_prompt"),
        ("model", "trainer.policy.model.path"),
        ("generator.model_path", "trainer.policy.model.path"),
        ("epochs", "trainer.epochs"),
        ("trainer.num_epochs", "trainer.epochs"),
        ("max_tokens", "generator.sampling_params.max_generate_length"),
        ("generator.sampling_params.max_new_tokens", "generator.sampling_params.max_generate_length"),
        ("temperature", "generator.sampling_params.temperature"),
        ("steps", "trainer.epochs"),
        ("trainer.max_steps", "trainer.epochs"),
        ("device", "trainer.device"),
        ("seed", "trainer.seed"),
        ("gpus", "trainer.device"),
        ("trainer.kl_coef", "trainer.algorithm.kl_loss_coef"),
        ("dataset", "data.train_data"),
        ("env", "environment.env_class"),
        ("outputDir", "trainer.ckpt_path"),
    ],
)
def test_an_unknown_key_that_other_trainers_have_is_told_ours(key, meant):
    text = problem(f"{key}=1")
    assert text.startswith(f"{key} is not a key of the configuration; did you mean {meant}")


def test_every_synonym_is_no_key_and_means_one_that_does_something():
    keys = [key for key, _ in leaves(SkyRLConfig())]
    assert set(SYNONYMS.values()) <= set(keys)
    assert SYNONYMS.keys() & {squeezed(key.rpartition(".")[2]) for key in keys} == {
        "model",
        "batchsize",
    }  # the judge's, the warm start's
    assert problem("environment.llm_as_a_judge.model=x").endswith("environment.skyrl_gym.llm_as_a_judge.model?")


def test_a_value_that_means_something_else_is_not_pasted():
    with pytest.raises(ConfigError) as caught:
        load_config(["max_steps=100", "learning_rate=0.1"])
    assert str(caught.value).endswith("This would start:\n  trainer.policy.optimizer_config.lr=0.1")


def test_an_unknown_key_far_from_all_is_told_where_they_are_listed():
    text = problem("my.own.thing=1")
    assert text.endswith("is written +my.own.thing=1, and `python -m skyrl_train.config` lists every key")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.epochs=abc", "trainer.epochs=abc has the wrong type: expected a whole number"),
        ("trainer.epochs=1.5", "trainer.epochs=1.5 has the wrong type: expected a whole number"),
        ("trainer.bf16=maybe", "trainer.bf16=maybe has the wrong type: expected true or false or null"),
        ("trainer.run_name=null", "trainer.run_name=null has the wrong type: expected text"),
        (
            "data.train_data=a.parquet",
            "data.train_data=a.parquet has the wrong type: expected a list of texts such as [a,b]",
        ),
        (
            "trainer.policy.model=gpt2",
            "trainer.policy.model=gpt2 is a section; set one of its keys: path, load_in_4bit, lora",
        ),
        (
            "trainer.epochs",
            "trainer.epochs has no value; write trainer.epochs=VALUE, or quotes around a value that holds spaces",
        ),
        (
            "trainer.seed=1,2",
            "trainer.seed=1,2 is a sweep, and one run takes one value; write a list as trainer.seed=[1,2]",
        ),
        ("~trainer.seed", "~trainer.seed would delete a key; set it to null or to its default"),
    ],
)
def test_what_cannot_be_read_is_explained(override, expected):
    assert problem(override) == expected


def test_special_characters_need_quotes():
    assert "put quotes around special characters" in problem("trainer.run_name=[1")
    assert load_config(["trainer.run_name='[1'"]).trainer.run_name == "[1"


def test_an_interpolation_that_leads_nowhere_is_named():
    assert problem("generator.max_input_length=${trainer.nope}").startswith(
        "generator.max_input_length=${trainer.nope} cannot be resolved"
    )


def test_all_problems_come_in_one_message():
    overrides = [
        "trainer.epoch=2",
        "trainer.seed=x",
        "trainer.policy.optimizer_config.lr=-1",
        "generator.backend=x",
    ]
    found = problems(*overrides, "generator.max_turns=2", "generator.max_input_length=10")
    assert len(found) == 5
    with pytest.raises(ConfigError, match=r"2 problems in the configuration:\n- trainer.epoch .*\n- trainer.seed=x"):
        load_config(overrides[:2])


def test_a_section_made_by_hand_refuses_a_wrong_value():
    with pytest.raises(ConfigError, match="top_p=0 must be above 0 and at most 1"):
        SamplingConfig(top_p=0)


def test_a_tree_made_by_hand_is_resolved_and_checked():
    made = SkyRLConfig(generator=GeneratorConfig(sampling_params=SamplingConfig(max_generate_length=5)))
    assert made.generator.max_input_length == "${trainer.max_prompt_length}"
    config = validate_cfg(made)
    assert (config.generator.max_input_length, config.generator.eval_sampling_params.max_generate_length) == (512, 5)
    made.generator.n_samples_per_prompt = 1
    with pytest.raises(ConfigError, match=r"generator.n_samples_per_prompt=1 gives grpo nothing to compare with"):
        validate_cfg(made)


def test_validating_twice_changes_nothing():
    config = load_config(["trainer.algorithm.loss_reduction=seq_mean_token_sum_norm"])
    assert config.trainer.algorithm.max_seq_len == 512 + 1024
    assert validate_cfg(config) == config


def test_errors_survive_a_trip_between_processes():
    with pytest.raises(ConfigError) as caught:
        load_config(["trainer.epochs=0"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == "trainer.epochs=0 must be at least 1"


def test_loading_imports_nothing_heavy():
    code = (
        "import sys, skyrl_train.config as c; c.load_config([]);"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
