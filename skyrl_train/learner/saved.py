"""A learner's state on the disk: written by any number of ranks, each its own rows, and read by any other number.

{folder}/index.json                 number of ranks, shape of every tensor, plain numbers
         rank_0_of_2.safetensors    the first half of the rows of every tensor
         rank_1_of_2.safetensors    the other half

Reading it runs no code. Whoever keeps the folder digests its files (run/checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrl_train.files import naming
from skyrl_train.learner.ranks import Ranks, rows_of
from skyrl_train.spans import span

INDEX = "index.json"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a tensor that one rank holds, and the shape of the whole tensor."""

    rows: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ToSave:
    """Rows of one model that `write_rank` writes. They are live: nobody changes them before it is done."""

    folder: Path
    parts: Mapping[str, Part]
    plain: Mapping[str, Any]


def write_rank(folder: Path, parts: Mapping[str, Part], plain: Mapping[str, Any], ranks: Ranks) -> None:
    """Write this rank's rows, and on rank 0 the index. `plain`: what JSON can hold, equal on every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        shapes = {name: list(part.shape) for name, part in parts.items()}
        index = json.dumps({"ranks": ranks.size, "plain": dict(plain), "shapes": shapes}, indent=1)
        with naming(folder / INDEX):
            (folder / INDEX).write_text(index + "\n", encoding="utf-8")
    path = folder / _file_name(ranks.rank, ranks.size)
    tensors = {name: part.rows.detach().reshape(_with_rows(part.rows.shape)) for name, part in parts.items()}
    with naming(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


class Writer:
    """Writes a rank's state from the live tensors in a thread of its own, so nothing is copied."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, files: Sequence[ToSave], ranks: Ranks) -> Future[None]:
        """Call `write_rank` for each. Until the returned future is done no tensor may change: call `wait` before."""
        self.wait()
        files = [replace(one, plain=deepcopy(dict(one.plain))) for one in files]
        self._writing = self._thread.submit(_write_each, files, ranks)
        return self._writing

    def wait(self) -> None:
        """Return once nothing reads the tensors any more. An error is for the owner of the future."""
        if self._writing is not None:
            with span("waiting for the checkpoint"):
                wait([self._writing])
            self._writing = None

    def close(self) -> None:
        self._thread.shutdown()


def _write_each(files: Sequence[ToSave], ranks: Ranks) -> None:
    for one in files:
        write_rank(one.folder, one.parts, one.plain, ranks)


def refuse_incomplete(folder: Path) -> None:
    """Raise FileNotFoundError if the file of a rank is missing, as it is where ranks of other machines wrote theirs."""
    size = SavedLearner(folder).num_ranks
    for rank in range(size):
        if not (path := folder / _file_name(rank, size)).is_file():
            raise FileNotFoundError(
                f"{path} is missing, although all {size} ranks have written: the ranks are on machines that do not "
                "share this folder. Set trainer.ckpt_path to a folder that all machines share"
            )


class SavedLearner:
    """Reads what `write_rank` wrote on all ranks. ValueError names the file that is something else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.num_ranks = int(index["ranks"])
            self.plain: dict[str, Any] = index["plain"]
            self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        except FileNotFoundError as error:
            raise ValueError(f"{folder / INDEX} is missing: no learner was saved there") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is not the index of a learner ({error})") from error

    def part(self, name: str, ranks: Ranks) -> Tensor:
        """Return the rows of a tensor that a rank of `ranks` holds, whichever ranks have written them."""
        shape = self.shapes[name]
        num_rows = _with_rows(shape)[0]
        first, stop = rows_of(num_rows, ranks.rank, ranks.size)
        pieces = []
        for rank in range(self.num_ranks):
            theirs, end = rows_of(num_rows, rank, self.num_ranks)
            start, until = max(first, theirs), min(stop, end)
            if start < until:
                pieces.append(self._read(name, rank, start - theirs, until - theirs))
        rows = torch.cat(pieces) if pieces else self._read(name, 0, 0, 0)
        return rows if shape else rows[0]

    def whole(self, name: str) -> Tensor:
        return self.part(name, Ranks())

    def _read(self, name: str, rank: int, start: int, stop: int) -> Tensor:
        path = self._folder / _file_name(rank, self.num_ranks)
        try:
            with naming(path), safe_open(path, framework="pt", device="cpu") as file:
                return file.get_slice(name)[start:stop]
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{path} does not hold the rows of {name} ({error})") from error


def _file_name(rank: int, size: int) -> str:
    return f"rank_{rank}_of_{size}.safetensors"


def _with_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor that has rows: a single number is one row."""
    return tuple(shape) or (1,)
