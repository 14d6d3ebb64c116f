"""Training. torch has not been imported yet when this runs, and reads what is set here when it loads and allocates."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from skyrl_train.left_out import LeftOut

if TYPE_CHECKING:
    from skyrl_train.entrypoints.library import train

__all__ = ["__version__", "train"]
__version__ = "0.1.0"

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in pages of 2 MiB: less than half as long to get
# Waiting threads of OpenMP spin some 0.15 ms, which covers the pauses between two kernels, and then sleep.
# libgomp's default is some 15 ms: beside other work they keep the thread that they wait for from a processor.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# oneDNN, and torch once more in front of it, keep a program of about 0.25 MB for every shape of a matmul that they have
# met: by default 1024 each, which is most of what a long run grows by.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "256")
sys.meta_path.append(LeftOut)  # behind those that find files


def __getattr__(name: str) -> Any:
    """Load `train` when it is asked for, so that importing this package stays cheap."""
    if name == "train":
        return importlib.import_module("skyrl_train.entrypoints.library").train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
