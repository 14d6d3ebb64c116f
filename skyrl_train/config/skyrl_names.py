"""Names that SkyRL's users know, and `make_config`, which builds a root class with sections of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.generator import GeneratorConfig, SamplingConfig
from skyrl_train.config.models import LoraConfig
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.config.section import RefusedSection, Section
from skyrl_train.config.trainer import TrainerConfig
from skyrl_train.config.tree import nested, to_yaml

BaseConfig = Section
SkyRLTrainConfig = SkyRLConfig
SkyRLLoraConfig = LoraConfig
SamplingParams = SamplingConfig


class FullyAsyncConfig(RefusedSection):
    """Generation that runs ahead of training."""

    section_key = "trainer.fully_async"


def make_config(
    algorithm_cls: type[AlgorithmConfig] | None = None,
    trainer_cls: type[TrainerConfig] | None = None,
    generator_cls: type[GeneratorConfig] | None = None,
) -> type[SkyRLConfig]:
    """Return a root class with the user's subclasses of our sections. `trainer_cls` wins over `algorithm_cls`.

    MyConfig = make_config(algorithm_cls=MyAlgorithmConfig); cfg = MyConfig.from_cli_overrides(sys.argv[1:])
    """
    if algorithm_cls is not None and trainer_cls is None:
        trainer_cls = _with(TrainerConfig, "TrainerConfig", algorithm=algorithm_cls)
    sections = {"trainer": trainer_cls, "generator": generator_cls}
    return _with(SkyRLConfig, "SkyRLConfig", **{name: cls for name, cls in sections.items() if cls is not None})


def get_config_as_dict(cfg: Any) -> dict[str, Any]:
    """Return the whole configuration as plain nested dictionaries."""
    return nested(cfg)


def get_config_as_yaml_str(cfg: Any) -> str:
    """Return the whole configuration as YAML."""
    return to_yaml(cfg)


def _with(base: Any, name: str, **sections: type) -> Any:
    """Return a subclass of a section in which these fields have another class."""
    body: dict[str, Any] = {key: field(default_factory=cls) for key, cls in sections.items()}
    return dataclass(type(name, (base,), {**body, "__annotations__": sections, "__module__": base.__module__}))
