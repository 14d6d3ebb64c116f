"""A training batch as a file: what one update was given, to look at afterwards."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from skyrl_train.files import naming, write_whole
from skyrl_train.types import Batch


def dump_batch(batch: Batch, export_path: Path | str, step: int) -> Path:
    """Write every tensor of the batch, by the name of its field, into dumped_data/global_step_{step}.safetensors."""
    path = Path(export_path) / "dumped_data" / f"global_step_{step}.safetensors"
    tensors = {"offsets": batch.offsets, **dict(batch.sample_tensors()), **dict(batch.token_tensors())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        write_whole(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    return path
