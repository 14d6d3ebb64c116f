"""RUN|MODEL of the commands: a run's folder, the model of one, or any model; with the settings that belong to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.commands.experiments import entry_point, is_openenv
from skyrl_train.config import SkyRLConfig
from skyrl_train.files import user_path
from skyrl_train.run.model_folder import read_origin
from skyrl_train.run.run_folder import MODEL, RUN_INFO, checkpoint_steps, run_around, where_its_run_is
from skyrl_train.run.saved_run import MODEL_PATH, SavedRun, read_run

# Settings of training that playing does not take over: where things are computed, and what is written where.
NOT_OF_PLAYING = (
    "trainer.placement", "trainer.strategy", "trainer.policy.fsdp_config", "trainer.ref", "trainer.device",
    "trainer.resume_mode", "trainer.resume_path", "trainer.logger", "trainer.policy.model.lora", "data.train_data",
    "generator.backend", "generator.num_inference_engines", "generator.inference_engine_tensor_parallel_size",
    "generator.gpu_memory_utilization", "generator.enforce_eager", "generator.enable_prefix_caching",
    "generator.engine_init_kwargs", "generator.enable_http_endpoint", "generator.http_endpoint_host",
    "generator.http_endpoint_port", "generator.served_model_name",
)  # fmt: skip
OF_THE_MODEL = (
    "generator.chat_template", "generator.step_wise_trajectories", "trainer.policy.model_config_kwargs", MODEL_PATH,
)  # fmt: skip
# What the record in a model's folder may say, wherever the folder comes from. The rest names code, data and addresses.
HARMLESS = (
    *OF_THE_MODEL, "generator.sampling_params", "generator.eval_sampling_params", "generator.max_input_length",
    "generator.use_conversation_multi_turn", "generator.append_eos_token_after_stop_str_in_multi_turn",
    "trainer.max_prompt_length",
)  # fmt: skip
ENV_CLASS = "environment.env_class"


@dataclass(frozen=True)
class Source:
    """One RUN|MODEL. `saved`: a checkpoint to load, else `model` is a folder or a name.

    settings: those of a run; the HARMLESS ones of a run that is not on this machine; {} of no run.
    """

    named: str
    model: str
    step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    saved: SavedRun | None = None

    @property
    def label(self) -> str:
        """Return a short name for tables."""
        if self.step is None:
            return self.named
        return f"{self.named} {'before' if self.step == 0 else f'step {self.step}'}"

    @property
    def names_environment(self) -> bool:
        """Return whether the settings say in which environment the model was trained."""
        return ENV_CLASS in self.settings


def source(named: str, *, before: bool = False, step: int | None = None) -> Source:
    """Return what a word names. ValueError if it is neither a run nor a model.

    before: the model that the run began with. step: the checkpoint of this step.
    """
    found = _found(named, step)
    if not before:
        return found
    if not found.settings:
        raise ValueError(f"{named} is no run, so there is nothing before it; name the model itself")
    base = found.saved.base_model() if found.saved else found.settings[MODEL_PATH]
    return Source(named, str(base), 0, found.settings)


def _found(named: str, step: int | None) -> Source:
    path = user_path(named)
    if not path.is_dir():
        if step is not None:
            raise ValueError(f"--step={step} needs a run's folder, and {named} is none")
        if path.exists():
            raise ValueError(f"{named} is a file; give a run's folder, or a model's{where_its_run_is(path)}")
        return Source(named, named)
    if step is None and (path / "config.json").is_file():
        return _model(named, path)
    if step is None and not checkpoint_steps(path) and (path / MODEL).is_dir():  # its checkpoints were deleted
        return _model(named, path / MODEL)
    saved = read_run(path, step)
    return Source(named, str(saved.settings.get(MODEL_PATH, "")), saved.step, saved.settings, saved)


def _model(named: str, folder: Path) -> Source:
    """Return a model's folder, with step and settings if a run has written it.

    A model may come from a stranger, and its record with it. So only a run on this machine names code, data and
    addresses: the run that the folder lies in, or else the one it says it comes from, by that run's own record.
    """
    step, told = read_origin(folder) or (None, {})
    if run_around(folder) is not None:
        return Source(named, str(folder), step, told)
    own = _recorded(user_path(str(told.get("trainer.ckpt_path"))), but_not_in=folder)
    return Source(named, str(folder), step, own or {key: told[key] for key in told if key.startswith(HARMLESS)})


def _recorded(run: Path, but_not_in: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; {} if there is no run, or it has kept none."""
    if not (run / RUN_INFO).is_file() or run.resolve().is_relative_to(but_not_in.resolve()):
        return {}
    try:
        there = read_origin(run / MODEL)
        return read_run(run).settings if there is None else there[1]
    except ValueError:
        return {}


def configuration(of: Source, keys: Iterable[str] = (), shared: Mapping[str, Any] | None = None) -> SkyRLConfig:
    """Return the checked settings to play with: those of the run, then the user's keys (`key=value`).

    shared: the settings of another run, from which everything but the model and its template is taken.
    """
    from skyrl_train.config.build import build
    from skyrl_train.config.overrides import parsed_overrides

    keys = list(keys)
    own = {key: value for key, value in of.settings.items() if key.startswith(OF_THE_MODEL)}
    others = {
        key: value
        for key, value in (of.settings if shared is None else shared).items()
        if not key.startswith((*NOT_OF_PLAYING, *OF_THE_MODEL))
    }
    settings = others | own | {MODEL_PATH: of.model, "trainer.gradient_checkpointing": False}
    typed, problems = parsed_overrides(keys)
    openenv = is_openenv([*keys, *(f"{key}={value}" for key, value in settings.items())])
    pairs = [*settings.items(), *typed]
    return build(entry_point(openenv=openenv).ROOT, pairs, problems, may_add=lambda key: key in settings)
