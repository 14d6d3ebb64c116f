"""The model of a run as a Hugging Face folder, made from a checkpoint, whichever ranks wrote it.

{run}/model/config.json, generation_config.json, tokenizer.json, chat_template.jinja, model.safetensors
            adapter/       the adapters alone, as PEFT keeps them, of a run that trained adapters
            skyrl.json     the step, and the settings of the run, which `skyrl chat`, `eval`, `play` and `serve` read
{run}/model.gguf           the same model for llama.cpp, of `skyrl export --format gguf`
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train.config import LoraConfig
from skyrl_train.files import byte_size, folder_bytes, naming, whole_file, whole_folder
from skyrl_train.learner.saved import SavedLearner
from skyrl_train.ops import ops_for
from skyrl_train.policy.four_bit import freeze_in_four_bits
from skyrl_train.policy.lora import adapters_of, add_adapters
from skyrl_train.policy.lora_files import ADAPTER_FOLDER, save_adapters, save_merged
from skyrl_train.policy.model import Policy
from skyrl_train.policy.model_files import load_config, load_module, load_tokenizer
from skyrl_train.run.contents import template_contents
from skyrl_train.run.run_folder import MODEL, ORIGIN, refuse_inside
from skyrl_train.run.saved_run import SavedRun, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "model.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MASTERS, LORA = "masters/", "trainer.policy.model.lora."
TEMPLATE = "generator.chat_template.name_or_path"


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder with a model, or a file. `kind`: model, adapter or GGUF model."""

    folder: str
    step: int
    kind: str
    dtype: str
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.folder} ({byte_size(self.num_bytes)}, {self.dtype})"


def export_model(
    saved: SavedRun,
    folder: Path | None = None,
    *,
    dtype: str = "bfloat16",
    adapter: bool = False,
    base: Path | str | None = None,
) -> Exported:
    """Write the model of a checkpoint, adapters merged, or with `adapter` the adapters alone.

    folder: default `model` (or `adapter`) in the run's folder; an older export there is replaced, once the
    new one is complete. base: where the model
    that the run began with lies, if it was moved.
    """
    if adapter and saved.lora_rank == 0:
        raise ValueError(
            f"the run in {saved.folder} trained the whole model, so it has no adapter; leave out --adapter"
        )
    kind = ADAPTER_FOLDER if adapter else MODEL
    folder = saved.folder / kind if folder is None else folder
    _refuse_other_folder(folder)
    tokenizer = trained_tokenizer(saved, base)
    module = trained_module(saved, DTYPES[dtype], base=base)
    with naming(folder), whole_folder(folder) as unfinished:
        if adapter:
            save_adapters(module, adapters_of(module), unfinished)
        else:
            save_merged(module, unfinished)
        tokenizer.save_pretrained(unfinished)
        origin = {"step": saved.step, "settings": saved.settings}
        (unfinished / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    return Exported(str(folder), saved.step, kind, dtype, folder_bytes(folder))


def export_gguf(
    saved: SavedRun, file: Path | None = None, *, dtype: str = "bfloat16", base: Path | str | None = None
) -> Exported:
    """Write the model of a checkpoint, adapters merged, as one GGUF file. file: default `model.gguf` in the run's.

    dtype: one of gguf_file.KINDS. ModelRefused, before anything is written, for a model that cannot be written so.
    """
    from skyrl_train.policy.gguf_file import refuse_unless_gguf, write_gguf

    file = saved.folder / GGUF if file is None else file
    _refuse_other_file(file)
    tokenizer = trained_tokenizer(saved, base)
    refuse_unless_gguf(load_config(saved.base_model(base), _changes(saved)), tokenizer)
    module = trained_module(saved, DTYPES.get(dtype, torch.float32), base=base)
    name = saved.folder.resolve().name
    with whole_file(file) as unfinished:
        about = f"step {saved.step} of the training run {name}"
        write_gguf(unfinished, module, tokenizer, dtype=dtype, name=name, about=about)
    return Exported(str(file), saved.step, "GGUF model", dtype, file.stat().st_size)


def trained_tokenizer(saved: SavedRun, base: Path | str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base, with the chat template that the run took."""
    tokenizer = load_tokenizer(saved.base_model(base))
    if (template := _template(saved)) is not None:
        setattr(tokenizer, "chat_template", template)  # noqa: B010 (its type is not declared)
    return tokenizer


def trained_module(saved: SavedRun, dtype: torch.dtype, *, base: Path | str | None = None) -> PreTrainedModel:
    """Return the model with the weights of the checkpoint, rounded as the learner rounds them; adapters stay apart."""
    settings = saved.settings
    module = load_module(saved.base_model(base), dtype, _changes(saved))
    if settings.get("trainer.policy.model.load_in_4bit"):
        freeze_in_four_bits(module, "cpu")
    if saved.lora_rank:
        lora = {
            field.name: settings[LORA + field.name] for field in fields(LoraConfig) if LORA + field.name in settings
        }
        add_adapters(Policy(module), LoraConfig(**lora), seed=0)
    learner, ops = SavedLearner(saved.learner), ops_for(torch.device("cpu"), dtype)
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    masters = {name.removeprefix(MASTERS) for name in learner.shapes if name.startswith(MASTERS)}
    if different := sorted(trained.keys() ^ masters):
        raise ValueError(
            f"the checkpoint in {saved.learner.parent} and the model differ in {len(different)} weights, e.g. "
            f"{different[0]}: it was written by a run with a model of its own (get_policy)"
        )
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(ops.rounded(learner.whole(MASTERS + name), dtype))
    return module


def export_at_the_end(folder: Path) -> str:
    """Write the model of a run's newest checkpoint into its folder, unless it is there. Return its place."""
    try:
        saved = read_run(folder)
        there = read_origin(folder / MODEL)
        if there is not None and there[0] == saved.step:
            return f"{folder / MODEL}"
        return str(export_model(saved))
    except ValueError as error:
        return f"none: {error}"


def read_origin(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Return step and settings of the run that an exported model comes from; None for any other model's folder."""
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return int(origin["step"]), dict(origin["settings"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ORIGIN} is damaged ({error}); remove it, or export the model again") from error


def _refuse_other_folder(folder: Path) -> None:
    """Raise ValueError for a folder that holds something that is not an earlier export, or that cannot be made."""
    _refuse_place(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ORIGIN).is_file():
        raise ValueError(f"{folder} holds other files, which would be replaced; give a new or empty folder")


def _refuse_other_file(file: Path) -> None:
    """Raise ValueError for a file that is not an earlier GGUF, or that cannot be made."""
    _refuse_place(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; a GGUF model is one file: give --output FILE.gguf")
    if file.exists():
        with file.open("rb") as there:
            if there.read(4) != b"GGUF":
                raise ValueError(f"{file} is another file, which would be replaced; give a new name")


def _refuse_place(path: Path) -> None:
    """Raise ValueError where nothing can be written, and inside a checkpoint or another export."""
    refuse_inside(path.parent)
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{path} cannot be written, because {there} is a file; give another place")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path} cannot be written: nothing may be written into {there}; give another place")


def _changes(saved: SavedRun) -> dict[str, Any]:
    """Return what the run changed in the configuration of its model."""
    prefix = "trainer.policy.model_config_kwargs."
    return {key.removeprefix(prefix): value for key, value in saved.settings.items() if key.startswith(prefix)}


def _template(saved: SavedRun) -> str | None:
    """Return the Jinja text that the run took in the place of the tokenizer's own template; None if it took that."""
    path = saved.settings.get(TEMPLATE)
    if path is None:
        return None
    from skyrl_train.rollout.chat import read_chat_template

    text = read_chat_template("file", path)
    if template_contents(text) != saved.contents.get(TEMPLATE, template_contents(text)):
        raise ValueError(f"{TEMPLATE}={path} is not the template that the run began with; put that back")
    return text
