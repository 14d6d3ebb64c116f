"""The flat form of a configuration, its differences, its YAML, and the table of keys."""

from __future__ import annotations

import json

import pytest
import yaml

from skyrl_train.config import SkyRLConfig, differences, load_config, to_flat_dict, to_yaml
from skyrl_train.config.__main__ import main
from skyrl_train.config.reference import MOST_USED, entries, refused_entries
from skyrl_train.config.refused import reason_against
from skyrl_train.config.refused_rows import ROWS
from skyrl_train.config.tree import leaves


def test_the_flat_form_goes_through_json_and_back_without_a_difference():
    config = load_config(["generator.sampling_params.stop=[a]", "generator.chat_template_kwargs.b=1"])
    flat = to_flat_dict(config)
    assert flat["generator.sampling_params.stop"] == ["a"]
    assert flat["generator.chat_template_kwargs.b"] == 1
    assert differences(json.loads(json.dumps(flat)), config) == {}


def test_differences_name_the_keys_with_both_values():
    before = load_config(["environment.skyrl_gym.mine.x=1"])
    after = load_config(["trainer.seed=7"])
    assert differences(before, after) == {
        "trainer.seed": (42, 7),
        "environment.skyrl_gym.mine.x": (1, "(absent)"),
    }


def test_yaml_gives_the_same_tree_again():
    config = load_config(["trainer.seed=7", "environment.skyrl_gym.mine.x=1"])
    assert SkyRLConfig.from_dict_config(yaml.safe_load(to_yaml(config))) == config


def test_every_key_has_a_meaning():
    rows = list(entries(SkyRLConfig))
    assert [entry.key for entry in rows if not entry.meaning] == []
    by_key = {entry.key: entry for entry in rows}
    assert by_key["trainer.epochs"].meaning == "passes over the training data"
    assert by_key["trainer.algorithm.max_seq_len"].meaning.startswith("Divisor of seq_mean_token_sum_norm; null")
    assert by_key["generator.eval_sampling_params.top_p"].meaning == "nucleus sampling; 1 is off"
    assert {entry.key: entry.default for entry in refused_entries()}["trainer.critic.fsdp_config.fsdp_size"] == "-1"


def test_the_most_used_keys_come_first_and_every_key_once():
    keys = [entry.key for entry in entries(SkyRLConfig)]
    assert keys[: len(MOST_USED)] == list(MOST_USED)
    assert sorted(keys) == sorted(key for key, _ in leaves(SkyRLConfig()))


def printed_keys(capsys, *arguments: str) -> list[str]:
    status = main(list(arguments))
    lines = capsys.readouterr().out.splitlines()
    assert status == (0 if any("=" in line for line in lines) else 1)
    return [line.partition("=")[0] for line in lines if line and line[0] not in "# " and "=" in line]


def test_keys_that_do_nothing_are_shown_on_demand(capsys):
    shown, everything = printed_keys(capsys), printed_keys(capsys, "--all")
    assert everything == [*shown, *ROWS]
    assert not set(shown) & ROWS.keys()


def test_words_are_searched_in_names_and_meanings(capsys):
    assert main(["--search", "adaptive"]) == 0
    printed = capsys.readouterr().out
    assert "trainer.algorithm.kl_ctrl.kl_target=0.1\n    adaptive: the KL to aim for\n" in printed
    assert "trainer.epochs" not in printed
    assert printed_keys(capsys, "--search", "learning", "rate") == [
        "trainer.policy.optimizer_config.lr",
        "trainer.critic.optimizer_config.lr",
        "trainer.sft.lr",
    ]
    assert printed_keys(capsys, "--search", "Epoch")[0] == "trainer.epochs"
    assert printed_keys(capsys, "--search", "eval_batch_size") == ["trainer.eval_batch_size"]
    assert printed_keys(capsys, "--search", "apt") == []  # a part of "adaptive" is no word


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("num_generations", "generator.n_samples_per_prompt"),
        ("ppo_mini_batch_size", "trainer.policy_mini_batch_size"),
        ("overlong_buffer", "trainer.algorithm.overlong_penalty.len"),
        ("gradient_accumulation_steps", "trainer.max_tokens_per_microbatch"),
    ],
)
def test_a_key_is_found_by_what_other_trainers_call_it(capsys, name, key):
    assert printed_keys(capsys, "--search", name)[0] == key


def test_the_reason_of_a_refusal_is_not_searched(capsys):
    assert "sharded as the policy is" in str(reason_against("trainer.critic.fsdp_config"))
    assert printed_keys(capsys, "--all", "--search", "sharded", "possible") == []
    assert "trainer.critic.model.path" in printed_keys(capsys, "--search", "critic", "model")
    assert len(printed_keys(capsys, "--all", "--search", "trainer", "placement")) == 8
