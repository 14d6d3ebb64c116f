"""One part of a checkpoint as a safetensors file: tensors as they are, plain data around them as JSON in the header.

{"masters": {"w": tensor}, "betas": (0.9, 0.99)}
-> tensor "0", and in the header {"masters": {"w": {"$tensor": "0"}}, "betas": {"$tuple": [0.9, 0.99]}}

Reading one runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrl_train.files import naming
from skyrl_train.run.digests import Damaged

SUFFIX = ".safetensors"
_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"  # $pairs: a dictionary whose keys JSON cannot hold
_PLAIN = "plain"


def write_part(value: Any, path: Path) -> None:
    """Write a part. Raises TypeError, with the place, if it holds more than tensors and plain data."""
    tensors: dict[str, Tensor] = {}
    plain = _to_json(value, path.name.removesuffix(SUFFIX), tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        save_file(_apart(tensors), path, metadata={_PLAIN: json.dumps(plain)})


def read_part(path: Path) -> Any:
    """Return the value that `write_part` was given, with every tensor on the CPU."""
    try:
        with naming(path), safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return _from_json(json.loads(file.metadata()[_PLAIN]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not a part of a checkpoint ({error})") from error


def _to_json(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value with its tensors moved to `tensors`; `where` is the path to it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if type(value) in (list, tuple):
        items = [_to_json(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {_TUPLE: items}
    if not isinstance(value, dict):
        raise TypeError(f"checkpoint: {where} is a {type(value).__name__}; only tensors and plain data can be saved")
    for key in value:
        if type(key) not in (str, int):
            raise TypeError(f"checkpoint: a key of {where} is a {type(key).__name__} ({key!r}); use str or int")
    items = {key: _to_json(item, f"{where}[{key!r}]", tensors) for key, item in value.items()}
    is_plain = all(type(key) is str and not key.startswith("$") for key in items)
    return items if is_plain else {_PAIRS: list(items.items())}


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_from_json(item, tensors) for item in value[_TUPLE])
    items = value[_PAIRS] if _PAIRS in value else value.items()
    return {key: _from_json(item, tensors) for key, item in items}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and without shared memory, as safetensors requires."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if place in taken else tensor.contiguous()
        taken.add(place)
    return apart
