"""The weights that a model name means: a folder, a hub model, the model of the package index (packaged.py), or "auto".

Nothing here imports torch before a conversion needs it.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from loguru import logger

from skyrl_train.files import user_path
from skyrl_train.policy.packaged import PACKAGED_MODEL, cache_folder, packaged_model

__all__ = ["PACKAGED_MODEL", "cache_folder", "packaged_model", "resolve_model"]

PACKAGED_NAMES = (PACKAGED_MODEL, "SmolLM2-135M-Instruct")
GPU_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
HUB_PATIENCE_S = 3.0
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
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
    if user_path(name).is_dir():
        return user_path(name)
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"model {name!r}: there is no such folder, and a model hub's id has the form owner/name")
    if (folder := _from_hub(name)) is None:
        raise ValueError(
            f"model {name!r}: no such folder, not in the Hugging Face cache, and the model hub did not answer within "
            f"{HUB_PATIENCE_S:.0f} s. Without the hub use {PACKAGED_MODEL}, which comes from the package index, or a "
            "local folder"
        )
    return folder


def _automatic() -> Path:
    import torch

    if not torch.cuda.is_available():
        return packaged_model()
    if (folder := _from_hub(GPU_MODEL)) is not None:
        return folder
    logger.warning(
        f"{GPU_MODEL} is not cached and the model hub did not answer within {HUB_PATIENCE_S:.0f} s: "
        f"taking {PACKAGED_MODEL}"
    )
    return packaged_model()


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
