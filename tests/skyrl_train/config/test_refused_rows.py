"""SkyRL's keys that may only keep their default: no fields, but read, set and refused wherever one meets them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from skyrl_train.config import (
    ConfigError,
    CriticConfig,
    DynamicSamplingConfig,
    FSDPConfig,
    FullyAsyncConfig,
    GeneratorConfig,
    SkyRLConfig,
    TrainerConfig,
    config_dir,
    get_default_config,
    load_config,
    make_config,
    to_flat_dict,
    validate_cfg,
)
from skyrl_train.config.problems import shown, written
from skyrl_train.config.refused import reason_against
from skyrl_train.config.refused_rows import ROWS
from skyrl_train.run.resume import check_same_run
from skyrl_train.run.run import MAY_CHANGE_ON_RESUME

FOLLOWS = {"generator.model_name", "generator.rope_scaling", "generator.rope_theta"}


def another(value: Any, kind: Any) -> Any:
    """A value of the right type that is not the default."""
    if str(value).startswith("$"):
        return {float | None: 0.75, str: "x"}.get(kind, {"b": 2})
    if value is None:
        return {float | None: 0.5, str | None: "x", Any: "x", list[str] | None: ["x"]}.get(kind, {"a": 1})
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {str: "x", list: [0.5] if kind == list[float] else ["x"], dict: {"a": 1}}[type(value)]


def answers(config: Any) -> set[str]:
    with pytest.raises(ConfigError) as caught:
        config()
    return {str(problem) for problem in caught.value.problems}


ANOTHER = {key: another(row.default, row.type) for key, row in ROWS.items()}
EXPECTED = {f"{key}={shown(value)} {reason_against(key)}" for key, value in ANOTHER.items()}


def test_every_default_is_accepted_as_it_is_shown():
    load_config([written(key, row.default) for key, row in ROWS.items() if key not in FOLLOWS])
    load_config([f"{key}={ROWS[key].default}" for key in FOLLOWS])


def test_every_other_value_is_refused_with_the_reason_of_its_row():
    assert answers(lambda: load_config([written(key, value) for key, value in ANOTHER.items()])) == EXPECTED


def test_what_hydra_composed_gets_the_same_answers():
    plain = {key: value for key, value in ANOTHER.items() if not isinstance(value, dict)}  # else Hydra wants a plus
    with initialize_config_dir(config_dir, version_base=None):
        composed = compose("ppo_base_config", overrides=[written(key, value) for key, value in plain.items()])
    assert answers(lambda: validate_cfg(composed)) == {e for e in EXPECTED if e.partition("=")[0] in plain}


def test_the_default_config_gives_the_same_answers():
    cfg = get_default_config()
    assert all(OmegaConf.select(cfg, key) == row.default for key, row in ROWS.items() if key not in FOLLOWS)
    for key, value in ANOTHER.items():
        OmegaConf.update(cfg, key, value, merge=False)
    assert answers(lambda: validate_cfg(cfg)) == EXPECTED
    with pytest.raises(ConfigError):
        OmegaConf.to_object(cfg)


def test_a_set_attribute_gets_the_same_answer_at_once():
    found = set()
    for key, value in ANOTHER.items():
        if key not in FOLLOWS:
            found |= answers(lambda key=key, value=value: set_attribute(load_config([]), key, value))
    assert found == {answer for answer in EXPECTED if answer.partition("=")[0] not in FOLLOWS}


def set_attribute(config: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, name, value)


def test_every_default_can_be_read_and_set():
    config: Any = load_config([])
    for key, row in ROWS.items():
        if key in FOLLOWS:
            continue
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        assert (getattr(section, name), section[name], section.get(name)) == (row.default,) * 3, key
        assert name in section
        setattr(section, name, row.default)
    assert to_flat_dict(config) == to_flat_dict(load_config([]))
    assert config.generator.model_name == config.trainer.policy.model.path  # as the tree was checked
    made: Any = GeneratorConfig()
    assert made.get("model_name", "none") == "none"
    with pytest.raises(AttributeError, match=r"generator.model_name is not read: .* use trainer.policy.model.path"):
        _ = made.model_name


def test_a_key_that_follows_another_is_compared_when_the_tree_is_checked():
    cfg = get_default_config()
    cfg.trainer.policy.model.path = "/m"
    made: Any = OmegaConf.to_object(cfg)
    assert validate_cfg(made).trainer.policy.model.path == "/m"
    cfg.generator.model_name = "mine"
    with pytest.raises(ConfigError, match=r"generator.model_name=mine is not read"):
        OmegaConf.to_object(cfg)
    made = SkyRLConfig()
    made.generator.model_name = "mine"
    with pytest.raises(ConfigError, match=r"generator.model_name=mine is not read"):
        validate_cfg(made)


def test_types_and_forms_of_a_refused_key_are_read_as_those_of_any_key():
    load_config(["trainer.algorithm.lambd='1.0'", "trainer.placement.colocate_policy_ref=yes"])
    load_config(["trainer.critic.sequence_parallel_size=${trainer.epochs}"])
    assert answers(lambda: load_config(["trainer.critic.sequence_parallel_size=x"])) == {
        "trainer.critic.sequence_parallel_size=x has the wrong type: expected a whole number"
    }
    assert answers(lambda: load_config(["trainer.fully_async=x"])) == {
        "trainer.fully_async=x is a section; set one of its keys: max_staleness_steps, num_parallel_generation_workers"
    }


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("train_batchsize", 3, "did you mean trainer.train_batch_size?"),
        ("n_samples_per_prompt", 3, "did you mean generator.n_samples_per_prompt?"),
        ("learning_rate", 3, "did you mean trainer.policy.optimizer_config.lr?"),
        ("rules", 3, "is not a key of the configuration"),
        ("zzz", 3, "a key of your own is written +trainer.zzz=3"),
        ("remove_microbatch_padding", True, "samples are always laid end to end"),
    ],
)
def test_an_unknown_name_cannot_be_set(name, value, says):
    config: Any = load_config([])
    with pytest.raises(ConfigError) as caught:
        setattr(config.trainer, name, value)
    assert str(caught.value).startswith(f"trainer.{name}")
    assert says in str(caught.value)
    assert name not in vars(config.trainer)


@dataclass
class MyTrainer(TrainerConfig):
    patience: int = 3
    flash_attn: Any = "mine"  # a field that SkyRL has, too

    def __post_init__(self) -> None:
        self._half = self.patience / 2
        super().__post_init__()


def test_fields_of_a_subclass_and_keys_of_ones_own_can_be_set():
    config: Any = make_config(trainer_cls=MyTrainer).from_cli_overrides(["trainer.patience=4", "+my.key=1"])
    config.trainer.patience, config.my.key = 5, 2
    config.environment.skyrl_gym.my_env = {"a": 1}
    assert (config.trainer.patience, config.my.key, config.trainer.flash_attn) == (5, 2, "mine")
    with pytest.raises(ConfigError, match=r"did you mean trainer.patience\?"):
        config.trainer.patiance = 5


def test_sections_of_skyrl_are_made_with_their_defaults_only():
    sampling: Any = DynamicSamplingConfig(max_sample_batches=30)
    critic: Any = CriticConfig()
    assert (sampling.type, critic.model.path) == (None, None)
    section: Any = FSDPConfig
    with pytest.raises(ConfigError, match=r"trainer.policy.fsdp_config.fsdp_size=2 is not possible"):
        section(fsdp_size=2)
    config: Any = load_config([])
    config.trainer.fully_async = FullyAsyncConfig()
    with pytest.raises(ConfigError, match=r"trainer.fully_async"):
        config.trainer.fully_async = FSDPConfig()


def test_a_constructor_takes_the_default_of_a_refused_key_and_no_other_value():
    section: Any = TrainerConfig
    trainer = section(epochs=2, flash_attn=False, fully_async=FullyAsyncConfig())
    assert (trainer.epochs, "flash_attn" in vars(trainer), "fully_async" in vars(trainer)) == (2, False, False)
    with pytest.raises(ConfigError, match=r"trainer.flash_attn=true has nothing to do"):
        section(flash_attn=True)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        section(epoch=2)
    assert MyTrainer(flash_attn="other").flash_attn == "other"


def test_a_copied_and_a_pickled_tree_keep_these_ways():
    config: Any
    for config in (copy.deepcopy(load_config([])), pickle.loads(pickle.dumps(load_config([])))):
        assert config.trainer.placement.colocate_policy_ref is True
        with pytest.raises(ConfigError, match=r"did you mean trainer.epochs"):
            config.trainer.epoch = 3


def test_the_checkpoint_of_a_version_in_which_these_keys_were_fields_is_gone_on_with():
    now = to_flat_dict(load_config([]))
    then = {**now, **{key: row.default for key, row in ROWS.items()}}
    check_same_run(then, now, MAY_CHANGE_ON_RESUME)
    with pytest.raises(ValueError, match=r"trainer.seed: was 1, is now 42"):
        check_same_run({**then, "trainer.seed": 1}, now, MAY_CHANGE_ON_RESUME)
